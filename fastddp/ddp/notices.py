"""What the user is told about the rounds of a model: once each, on rank 0."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

_log = logging.getLogger("fastddp")
_MAX_NAMES = 50


class Notices:
    """Remembers what has been said about one model."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def unused(self, names: Callable[[], Iterable[str]], rank: int) -> None:
        """Tells which parameters no rank has used, at the end of the first round.

        Args:
            names: returns the names of those parameters; called for the first round only.
            rank: this rank's number within the group.
        """
        if not self._is_first("unused"):
            return
        listed = list(names())
        if listed and rank == 0:
            _log.warning(
                "no rank has used %d parameters in the first backward; their gradients are left"
                " alone: %s%s",
                len(listed),
                ", ".join(listed[:_MAX_NAMES]),
                "" if len(listed) <= _MAX_NAMES else f" and {len(listed) - _MAX_NAMES} more",
            )

    def empty(self, title: str, rank: int) -> None:
        """Tells that no rank had any gradient in a round.

        Args:
            title: what messages call the model.
            rank: this rank's number within the group.
        """
        if rank == 0 and self._is_first("empty"):
            _log.warning(
                "no rank had a gradient for any parameter of %s in a backward through its output;"
                " are its parameters those that the loss depends on?",
                title,
            )

    def _is_first(self, what: str) -> bool:
        is_first = what not in self._said
        self._said.add(what)
        return is_first

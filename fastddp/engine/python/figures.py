"""The figures of a reducer: how long rounds took, and which parameters they left unused."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import ParamSpec, Protocol, cast

from fastddp.engine.python.parameters import Parameter
from fastddp.engine.stats import Stats
from fastddp.watch import events
from fastddp.watch.events import Kind

P = ParamSpec("P")


@dataclass(slots=True)
class Times:
    """The times of one round, as this rank's host saw it."""

    begin: float = field(default_factory=time.perf_counter)
    began_ns: int = field(default_factory=time.time_ns)
    backward_us: float = 0.0
    """The time from the begin of the round to the end of backward or the call of ``finalize``."""
    launched: float | None = None
    """The time at which the first collective was launched."""

    def note_launch(self) -> None:
        """Takes note that a collective is launched now."""
        self.launched = self.launched or time.perf_counter()

    def note_end_of_backward(self) -> None:
        """Takes note that the backward is over, or counts as over."""
        self.backward_us = self.us_so_far()

    def us_so_far(self) -> float:
        """Returns the microseconds since the round began."""
        return (time.perf_counter() - self.begin) * 1e6


class Figures:
    """What a reducer can say of the rounds so far.

    Args:
        owner: the number of the model.
    """

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.stats = Stats()
        self.unused: list[str] = []
        """Names of the parameters that no rank had a gradient for in the first round."""
        self.error = ""
        """What the latest error in a backward said."""
        self._unused_last: list[int] | None = None  # by this rank, in the latest round

    def note_plan(self, bytes_per_round: int, num_buckets: int) -> None:
        """Takes note of a plan that was installed."""
        self.stats = replace(self.stats, bytes_per_round=bytes_per_round, num_buckets=num_buckets)

    def note_round(self, times: Times, start: float, end: float, *, overlaps: bool) -> None:
        """Takes note of a round that has ended well.

        Args:
            times: the times of the round that has ended.
            start: the time at which this rank began to wait for the collectives, in seconds.
            end: the time at which the last collective was over, in seconds.
            overlaps: whether buckets were launched while backward went on.
        """
        wait_us = (end - start) * 1e6
        self.stats = replace(
            self.stats,
            rounds=self.stats.rounds + 1,
            wait_us_last=wait_us,
            wait_us_total=self.stats.wait_us_total + wait_us,
            overlaps=overlaps,
            began_ns=times.began_ns,
            backward_us_last=times.backward_us,
            comm_us_last=(end - (times.launched or end)) * 1e6,
        )

    def note_unused_by_all(self, names: Iterable[str]) -> None:
        """Takes note of the parameters that no rank used, if this is the first round."""
        if self.stats.rounds == 0:
            self.unused += names

    def note_unused_here(self, params: Sequence[Parameter]) -> None:
        """Compares the parameters that this rank did not use with those of the round before."""
        unused = sorted(param.index for param in params)
        if unused != self._unused_last:
            is_first = self._unused_last is None
            self._unused_last = unused
            self.stats = replace(
                self.stats,
                unused_bytes_last=sum(param.tensor.nbytes for param in params),
                is_static=self.stats.is_static and is_first,
            )


class HasFigures(Protocol):
    """An object that :func:`noting_errors` can decorate the methods of."""

    figures: Figures


def noting_errors(entry: Callable[P, None]) -> Callable[P, None]:
    """Has a reducer keep the text of errors that this method of it raises."""

    @wraps(entry)
    def noting(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            entry(*args, **kwargs)
        except Exception as error:
            figures = cast(HasFigures, args[0]).figures
            events.record(Kind.ERROR, figures.owner)
            figures.error = str(error)
            raise

    return noting

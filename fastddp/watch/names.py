"""What messages call the models, buckets and parameters that are numbers on a board."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

_MAX_NAMED = 2


class Planned(Protocol):
    """What knows the plan of a model's buckets: a reducer."""

    def plan(self) -> Any:
        """Returns a :class:`fastddp.engine.plan.BucketPlan`; any thread may call it."""


@dataclass(frozen=True)
class ModelNames:
    """The names of one model, the same on every rank."""

    title: str
    params: Sequence[str] = ()
    """The names of the parameters, by the index that the reducer gives them."""
    buckets: Callable[[], Sequence[Sequence[int]]] = field(default=lambda: ())
    """Returns the indices of the parameters in each bucket; may be called by any thread."""

    def in_bucket(self, bucket: int) -> str:
        """Returns text such as ``a.weight, a.bias and 4 more``; empty if nothing is known.

        Args:
            bucket: the number of the bucket, from 1 on; the numbers after those of buckets are for
                other collectives of the round.
        """
        try:
            plan = self.buckets()
        except (RuntimeError, AttributeError):  # the reducer is being closed
            return ""
        if not 1 <= bucket <= len(plan):
            return ""
        names = [self.params[index] for index in plan[bucket - 1] if index < len(self.params)]
        rest = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        return ", ".join(names[:_MAX_NAMED]) + rest

    def param(self, last_param: int) -> str:
        """Returns the name of a parameter by its number on a board, which counts from 1."""
        return self.params[last_param - 1] if 0 < last_param <= len(self.params) else ""


_NONE = ModelNames("")
_models: dict[tuple[int, int], ModelNames] = {}
_groups: dict[int, str] = {}
DEFAULT_GROUP = "0"


def introduce(owner: int, group: int, names: ModelNames) -> None:
    """Has messages call a model, its buckets and its parameters by their names.

    Args:
        owner: the number of the model.
        group: the number of its group on boards.
        names: the names of the model; another model's, if it has the same number, are replaced.
    """
    _models[owner, group] = names


def of(owner: int, group: int) -> ModelNames:
    """Returns the names of a model; empty ones if it is not known here.

    Args:
        owner: the number of the model.
        group: the number of its group on boards.
    """
    return _models.get((owner, group), _NONE)


def introduce_group(group: int, name: str) -> None:
    """Has messages call a group by its name.

    Args:
        group: the number of the group on boards.
        name: the name of the group.
    """
    _groups[group] = name


def of_group(group: int) -> str:
    """Returns the name of a group; empty for the default group, and if it is not known here."""
    name = _groups.get(group, "")
    return "" if name == DEFAULT_GROUP else name


def weakly(planned: Planned) -> Callable[[], Sequence[Sequence[int]]]:
    """Returns a function for :attr:`ModelNames.buckets` that does not keep the reducer alive.

    Args:
        planned: what knows the plan.
    """
    alive = weakref.ref(planned)

    def buckets() -> Sequence[Sequence[int]]:
        reducer = alive()
        if reducer is None:
            return ()
        buckets = reducer.plan().buckets
        return [[slot.param for slot in bucket.slots] for bucket in buckets]

    return buckets

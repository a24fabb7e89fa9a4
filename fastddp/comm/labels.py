"""Labels: which model a collective belongs to, so that two models' collectives never mix.

On shared memory the ranks compare them before memory is touched (``csrc/shm/label.h``); buckets
carry them on every transport (``fastddp/engine/marks.py``).
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.distributed import ProcessGroup

from fastddp import extension
from fastddp.watch import names
from fastddp.watch.layout import id_of
from fastddp.watch.names import Planned

WHOLE = 0xFFFFFFFF
"""The part of a label that stands for the whole model, and not for one bucket."""

_num_wrapped: weakref.WeakKeyDictionary[ProcessGroup, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Owner:
    """A wrapped model, as all ranks know it."""

    number: int
    """32 bits; not 0, which is the script itself."""
    title: str
    """What messages call the model."""


def number_models(group: ProcessGroup, module: nn.Module, together: bool) -> Owner:
    """Returns the owner for the next model that is wrapped in a group; the same on every rank.

    Args:
        group: the ranks that wrap the model.
        module: the model to be wrapped.
        together: whether all ranks wrap it now. If not, they need not have wrapped equally many
            models before, and the owner is that of all such models.
    """
    if not together:
        return _owner("apart", f"model '{type(module).__name__}'")
    nth = _num_wrapped[group] = _num_wrapped.get(group, 0) + 1
    title = f"model '{type(module).__name__}' (number {nth} of those wrapped)"
    return _owner(f"number {nth}", title)


def owner_of_copy(module: nn.Module) -> Owner:
    """Returns the owner for a copy of a wrapped model, which any rank may make alone.

    Args:
        module: the copy of the model.
    """
    return _owner("copy", f"a copy of model '{type(module).__name__}'")


def _owner(key: str, title: str) -> Owner:
    return Owner(zlib.crc32(key.encode()) or 1, title)


def introduce(owner: Owner, group_name: str, params: Sequence[str], reducer: Planned) -> None:
    """Has messages about collectives call the owner, and what is in its buckets, by their names.

    Args:
        owner: the model that collectives are labelled with.
        group_name: the name of the group that the model was wrapped on; empty for none.
        params: the names of its parameters, by the index that they have in plans.
        reducer: what knows the plan of the model's buckets; not kept alive.
    """
    known = names.ModelNames(owner.title, tuple(params), names.weakly(reducer))
    names.introduce(owner.number, id_of(group_name) if group_name else 0, known)
    native = extension.load()
    if native is not None:
        native.name_owner(owner.number, owner.title)


@contextmanager
def labelled(owner: int, what: int = WHOLE) -> Iterator[None]:
    """Labels the collectives that this thread launches inside.

    Args:
        owner: the number of the model that they belong to.
        what: the number of a bucket, or :data:`WHOLE`.
    """
    native = extension.load()
    if native is None:  # then there is no shared memory either
        yield
        return
    before = native.set_label(owner << 32 | what)
    try:
        yield
    finally:
        native.set_label(before)

"""Labels: whose a collective is, so that one model's can never be taken for another's.

On shared memory the ranks compare them before memory is touched (``csrc/shm/label.h``); buckets
carry them on every transport (``fastddp/engine/marks.py``).
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.distributed import ProcessGroup

from fastddp import extension

WHOLE = 0xFFFFFFFF
"""What a label says of a collective that is of no bucket."""

_num_wrapped: weakref.WeakKeyDictionary[ProcessGroup, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Owner:
    """A wrapped model, as all ranks know it."""

    number: int
    """32 bits; not 0, which is the script itself."""
    title: str
    """For messages."""


def number_models(group: ProcessGroup, module: nn.Module, together: bool) -> Owner:
    """Returns the owner for the next model that is wrapped in a group, on every rank the same.

    Args:
        group: where.
        module: the model.
        together: whether all ranks wrap it now; else they need not have wrapped as many before.
    """
    if not together:
        return _owner("apart", f"model '{type(module).__name__}'")
    nth = _num_wrapped[group] = _num_wrapped.get(group, 0) + 1
    title = f"model '{type(module).__name__}' (number {nth} of those wrapped)"
    return _owner(f"number {nth}", title)


def owner_of_copy(module: nn.Module) -> Owner:
    """Returns the owner for a copy of a wrapped model, which any rank may make alone."""
    return _owner("copy", f"a copy of model '{type(module).__name__}'")


def _owner(key: str, title: str) -> Owner:
    return Owner(zlib.crc32(key.encode()) or 1, title)


def introduce(owner: Owner) -> None:
    """Has messages about collectives call the owner by its title."""
    native = extension.load()
    if native is not None:
        native.name_owner(owner.number, owner.title)


@contextmanager
def labelled(owner: int, what: int = WHOLE) -> Iterator[None]:
    """Labels the collectives that this thread launches inside."""
    native = extension.load()
    if native is None:  # then there is no shared memory either
        yield
        return
    before = native.set_label(owner << 32 | what)
    try:
        yield
    finally:
        native.set_label(before)

"""What ranks tell each other at the end of a bucket, behind the gradients and the flags.

A mark is one element. It is 0 or 1 before the reduction, and non-zero after it if any rank has set
it, in any dtype and for any number of ranks. One mark says that a rank's model has changed since it
was wrapped. The others spell the label of the bucket, two marks for each bit, and a rank sets one
of the two: if both come back, the ranks have added up different buckets. ``csrc/core/marks.h`` is
the same in C++.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastddp.engine.plan import NUM_MARKS

_CHANGED = 0
_LABEL_BITS = (NUM_MARKS - 1) // 2


def label_of(owner: int, launch: int) -> int:
    """Returns 16 bits that stand for one bucket of one model.

    Args:
        owner: the number of the model, in 32 bits.
        launch: the number of the collective among those of a round.
    """
    mixed = (owner ^ (launch * 0x9E3779B1 & 0xFFFFFFFF)) * 0x85EBCA6B & 0xFFFFFFFF
    return mixed >> 16


def marks_of(label: int, has_changed: bool) -> list[float]:
    """Returns the marks that a rank sends.

    Args:
        label: the label of the bucket, in 16 bits.
        has_changed: whether the rank's model has changed.
    """
    marks = [0.0] * NUM_MARKS
    marks[_CHANGED] = float(has_changed)
    for bit in range(_LABEL_BITS):
        marks[1 + 2 * bit + (label >> bit & 1)] = 1.0
    return marks


def set_changed(marks: torch.Tensor) -> None:
    """Changes marks to say that this rank's model has changed."""
    with torch.no_grad():
        marks[_CHANGED].fill_(1)


def any_changed(marks: Sequence[float]) -> bool:
    """Returns whether the model of any rank has changed."""
    return marks[_CHANGED] != 0


def is_mixed(label: int, marks: Sequence[float]) -> bool:
    """Returns whether another rank's bucket had another label."""
    return any(marks[1 + 2 * bit + (~label >> bit & 1)] != 0 for bit in range(_LABEL_BITS))

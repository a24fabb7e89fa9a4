"""What a reducer in Python has come to, on the board; ``csrc/core/board.h`` is the same in C++."""

from __future__ import annotations

import time

from fastddp.watch import board
from fastddp.watch.board import Board
from fastddp.watch.layout import Model

_FILLING = 1  # Phase::kFilling in csrc/core/phase.h


class ModelPlace:
    """A model's place on the board, from the first round that has a board until :meth:`free`.

    Args:
        owner: the model's number, see :class:`fastddp.comm.labels.Owner`.
        group: the :func:`fastddp.watch.layout.id_of` the name of the reducer's group.
    """

    def __init__(self, owner: int, group: int) -> None:
        self._owner = owner
        self._group = group
        self._board: Board | None = None
        self._place: int | None = None

    def set_phase(self, phase: int, steps: int) -> None:
        """Notes that the phase has changed.

        Args:
            phase: the number of the phase, in the order of the class.
            steps: rounds that have ended.
        """
        self._take()
        self._put(Model.OWNER, self._owner)
        self._put(Model.GROUP, self._group)
        self._put(Model.PHASE, phase)
        self._put(Model.STEPS, steps)
        if phase == _FILLING:
            self._put(Model.LAST_PARAM, 0)
            self._put(Model.LAUNCHED, 0)
        self._put(Model.CHANGED, time.monotonic_ns())

    def set_last_param(self, index: int) -> None:
        """Notes the parameter that got a gradient last."""
        self._put(Model.LAST_PARAM, index + 1)

    def set_launched(self, launched: int) -> None:
        """Notes how many collectives the round under way has launched."""
        self._put(Model.LAUNCHED, launched)

    def free(self) -> None:
        """Leaves the place to another model."""
        if self._place is not None and self._board is not None and self._board is board.own():
            self._board.free_model(self._place)
        self._place = None

    def _take(self) -> None:
        """Takes a place, also where there is another board than before: that of a forked child."""
        own = board.own()
        if own is not self._board:
            self._board, self._place = own, own.take_model() if own is not None else None

    def _put(self, word: Model, value: int) -> None:
        if self._place is not None and self._board is not None and self._board is board.own():
            self._board.put_model(self._place, word, value)

"""Reads the marks of rounds: at once, late from a device, or after a backward that raised."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch

from fastddp.device.streams import LateCopy, has_streams
from fastddp.engine.hooks import Wait
from fastddp.engine.launch_order import LaunchOrder
from fastddp.engine.marks import any_changed, is_mixed, label_of
from fastddp.engine.python.bucket import Collective, Marks
from fastddp.engine.python.context import Context


@dataclass(frozen=True, slots=True)
class _LeftNews:
    """The marks of a round that ended because its backward has raised."""

    waits: Sequence[Wait]
    marks: Sequence[Marks]
    has_changed: bool = False


class MarkReader:
    """Reads what the ranks have told each other at the tails of buckets.

    Args:
        context: the facts that all parts of the reducer share.
        order: the order of launching on the group, which knows the other models' titles.
    """

    def __init__(self, context: Context, order: LaunchOrder) -> None:
        self._context = context
        self._order = order
        self._late: deque[tuple[LateCopy, list[Collective]]] = deque()
        self._left: _LeftNews | None = None

    def read(self, marks: Sequence[Marks], *, at_once: bool) -> bool:
        """Returns whether the model of any rank has changed, as far as the host knows by now.

        The host does not wait for a device unless ``at_once`` is set: the next round, or one after
        it, finds the marks on the host.

        Args:
            marks: the marks of a round that is over.
            at_once: whether to wait for a device, as a rank does that has news itself.

        Raises:
            RuntimeError: if the ranks have added up different buckets.
        """
        if not has_streams(self._context.device):
            return self._check((one.collective, one.reduced.tolist()) for one in marks)
        late = LateCopy(torch.stack([one.reduced for one in marks]))
        self._late.append((late, [one.collective for one in marks]))
        return at_once and self.take_late(waits=True)

    def take_late(self, *, waits: bool) -> bool:
        """Returns whether marks that :meth:`read` did not wait for say that a model has changed."""
        has_changed = False
        while self._late and (waits or self._late[0][0].is_there()):
            late, collectives = self._late.popleft()
            if waits:
                late.wait()
            has_changed |= self._check(zip(collectives, late.copy.tolist(), strict=True))
        return has_changed

    # ---- of a round that its backward has left ---------------------------------------------------

    @property
    def has_left_news(self) -> bool:
        """Whether there are marks of such a round, or news, that nobody has read."""
        return self._left is not None

    def leave(self, waits: Sequence[Wait], marks: Sequence[Marks]) -> None:
        """Keeps the marks of such a round, and the functions that wait for its collectives."""
        self._left = _LeftNews(waits, marks)

    def leave_news(self) -> None:
        """Has the next :meth:`read_left_news` say that a model has changed."""
        self._left = _LeftNews((), (), has_changed=True)

    def read_left_news(self) -> bool:
        """Returns whether the model of any rank had changed in such a round; once only."""
        left, self._left = self._left, None
        if left is None:
            return False
        try:
            for wait in left.waits:
                wait()
            marked = ((one.collective, one.reduced.tolist()) for one in left.marks)
            return self._check(marked) or left.has_changed
        except RuntimeError:  # what comes next on the group says more
            return left.has_changed

    def _check(self, marked: Iterable[tuple[Collective, list[float]]]) -> bool:
        has_changed = False
        for collective, values in marked:
            if is_mixed(label_of(self._context.number, collective.number), values):
                self._refuse_mixture(collective)
            has_changed |= any_changed(values)
        return has_changed

    def _refuse_mixture(self, collective: Collective) -> NoReturn:
        context = self._context
        others = self._order.others(context.number) or "none that this rank has"
        raise RuntimeError(
            f"fastddp: rank {context.rank}: {collective.text} of {context.title} was added up"
            f" with a bucket of another model on the same group ({others}), so these"
            " gradients are wrong; run the models' forwards in the same order on all ranks"
        )

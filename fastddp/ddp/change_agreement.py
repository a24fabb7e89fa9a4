"""What the ranks do about a model that has changed since it was wrapped.

A rank that finds a change in its own model retires its reducer. The other ranks hear of it with the
next round, and at the end of that backward all of them compare their models and changes. If they
are the same, everybody gets rank 0's values and another reducer, which averages what is in
``.grad``; else everybody raises.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Protocol

from torch.distributed import ProcessGroup

from fastddp.comm.waiting import waiting
from fastddp.ddp.agreement import agree_on_module
from fastddp.ddp.attachment import Attachment
from fastddp.ddp.changes import ModelWatch, describe
from fastddp.ddp.model import Model
from fastddp.ddp.options import Options
from fastddp.ddp.ranks import Ranks
from fastddp.ddp.start import broadcast_model, check
from fastddp.device.backward import at_end_of_backward, in_backward
from fastddp.device.streams import has_streams
from fastddp.engine.interface import Reducer
from fastddp.engine.news import News
from fastddp.errors import MismatchError


class Copy(Protocol):
    """One rank's copy of a model, as far as an agreement needs it."""

    model: Model
    ranks: Ranks
    options: Options
    changes: ChangeAgreement
    attachment: Attachment | None

    def reattach(self) -> None:
        """Hooks the parameters that there are now."""


_copies: weakref.WeakKeyDictionary[ProcessGroup, weakref.WeakSet[Copy]] = (
    weakref.WeakKeyDictionary()
)


def join_group(copy: Copy) -> None:
    """Has a copy take part in :func:`settle` for the models on its group."""
    group = copy.ranks.group
    if group is not None:
        _copies.setdefault(group, weakref.WeakSet()).add(copy)


class ChangeAgreement:
    """The changes of one model, from the moment they are seen until all ranks agree on them.

    Args:
        model: the model, as it was wrapped.
    """

    def __init__(self, model: Model) -> None:
        self.pending = ""
        """What has changed since the ranks agreed on the model, in words; empty for nothing."""
        self._model = model
        self._watch = ModelWatch(model.module)
        self._num_agreements = 0

    # ---- this rank -------------------------------------------------------------------------------

    def look(self) -> None:
        """Takes the model as it is now for the one to compare with, unless a change is pending."""
        if not self.pending:
            self._watch.look()

    def doubt(self) -> None:
        """Finds a change of registered parameters, if there might be one, and leaves it pending."""
        if not self.pending and self._watch.is_doubtful:
            self.pending = self._watch.difference()

    def notice(self, attachment: Attachment, *, after_forward: bool) -> None:
        """Retires a reducer if its parameters are no longer those that were hooked.

        Args:
            attachment: the reducer, hooked, and nothing pending.
            after_forward: whether the model has run since it was last looked at: parameters of
                another shape are of no interest then, since the graph has the former ones.
        """
        reducer = attachment.reducer
        if (
            (self._watch.is_doubtful and self._watch.difference())
            or reducer.outgrown()
            or (not after_forward and reducer.is_stale())
        ):
            self.pending = self._describe(reducer)
            attachment.retire()

    def _describe(self, reducer: Reducer) -> str:
        """Returns what differs from when the parameters were hooked, in words.

        The same on ranks that made the same changes, whenever each was noticed.
        """
        what = [self._watch.difference()]
        if reducer.outgrown():
            named = self._model.module.named_parameters()
            trained = ((name, param) for name, param in named if param.requires_grad)
            what.append(
                describe({"trained now": [n for n, p in trained if p not in self._model.hooked]})
            )
        if reducer.is_stale():
            what.append("a parameter has another shape, layout, dtype, device or storage")
        return "; ".join(text for text in what if text) or "something that has been undone since"

    # ---- all ranks -------------------------------------------------------------------------------

    def answer(self, copy: Copy, news: News) -> None:
        """Does what news of a change, which a round has brought, ask for. On all ranks alike.

        Raises:
            MismatchError: if the ranks did not make the same change.
        """
        if news is News.CHANGED_BEFORE:
            self.agree(copy, has_changed=False)  # raises
        elif in_backward():
            # Once all models of this backward are done: ranks launch the buckets of those that
            # come after this one at times of their own.
            at_end_of_backward(partial(self._at_end_of_backward, copy))
        else:
            self.agree(copy)

    def _at_end_of_backward(self, copy: Copy, ok: bool) -> None:
        if ok:
            self.agree(copy)
        elif copy.attachment is not None:  # it has raised here, perhaps alone: other ranks wait
            copy.attachment.reducer.leave_news()

    def agree(self, copy: Copy, *, has_changed: bool | None = None, adds: bool = True) -> None:
        """Finds out whether all ranks made the same change, and averages what there is now.

        Called on every rank, at the end of the round in which one has said that its model changed.

        Args:
            copy: this rank's copy of the model.
            has_changed: whether this rank's model had changed in that round, by default whether it
                has by now.
            adds: whether what is in ``.grad`` belongs to that round. Else it stays as it is, and
                the average is the other ranks' alone.

        Raises:
            MismatchError: on every rank, if they did not.
        """
        assert copy.attachment is not None
        self._compare(copy, copy.attachment.reducer, has_changed)
        if copy.options.init_sync:
            broadcast_model(copy.model, copy.ranks, with_buffers=copy.options.init_sync_buffers)
        adds_own = adds and not copy.attachment.is_shadowing
        self.pending = ""
        self.look()
        copy.reattach()
        assert copy.attachment is not None
        if adds_own:
            copy.attachment.reducer.average()
            return
        kept = {param: param.grad for param in self._model.module.parameters()}
        for param in kept:  # what is there is the others', or of another time
            param.grad = None
        copy.attachment.reducer.average()
        if not adds:
            for param, grad in kept.items():
                param.grad = grad

    def _compare(self, copy: Copy, reducer: Reducer, has_changed: bool | None) -> None:
        has_changed = bool(self.pending) if has_changed is None else has_changed
        # As of now: a rank may have noticed one change of several, in a forward of its own.
        change = self._describe(reducer) if has_changed else "none"
        model, ranks = copy.model, copy.ranks
        settings = {**copy.options.to_agree_on(), "the change since it was wrapped": change}
        self._num_agreements += 1
        # On a device a rank that has not changed comes late, after other collectives.
        topic = f"{model.owner.number}/{self._num_agreements}"
        try:
            agree_on_module(
                ranks.live_group,
                model.module,
                settings,
                partial(check, model, ranks, copy.options),
                topic if has_streams(model.device) else None,
            )
        except MismatchError as error:
            raise MismatchError(
                f"{error} (Found out after a backward, since rank {ranks.live_group.rank()}'s model"
                f" has changed: {change if has_changed else 'it has not, but another one has'}.)"
            ) from None


def owes_agreement(copy: Copy) -> bool:
    """Returns whether other ranks wait for this one to agree on a change.

    They do if its latest backward has raised, maybe before it could know of the change. Waits for
    the rest of that round.
    """
    group, attachment = copy.ranks.group, copy.attachment
    if group is None or attachment is None or not attachment.reducer.has_left_news:
        return False
    with waiting(group, "the rest of a backward that has raised"):
        owes = attachment.reducer.read_left_news()
    if owes:
        attachment.reducer.leave_news()
    return owes


def settle(group: ProcessGroup) -> None:
    """Agrees with the other ranks on changes for which they wait since a backward that has raised.

    Of all models on the group, in the order in which the others do. Collective then.

    Args:
        group: the ranks of the models, alive.

    Raises:
        MismatchError: if the ranks did not make the same change.
    """
    owing = [
        (copy.attachment.reducer.began_ns, copy)
        for copy in list(_copies.get(group, ()))
        if owes_agreement(copy) and copy.attachment is not None
    ]
    for _, copy in sorted(owing, key=lambda one: one[0]):
        assert copy.attachment is not None
        copy.attachment.reducer.read_left_news()
        copy.changes.agree(copy, adds=False)

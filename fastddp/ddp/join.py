"""Uneven inputs: what a rank that has run out does so that the others can go on.

Torch's ``Join`` context runs a *join hook* on such a rank once for every forward of the ranks that
still have inputs, until there are none. The hook must issue the collectives that they issue, in the
same order:

* for each forward: one to agree who has current buffers, and their broadcast, if there are any;
* one to say whether gradients will be averaged;
* if so, those of a round.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ReduceOp
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from fastddp.comm.patience import wait_for
from fastddp.comm.waiting import waiting
from fastddp.ddp.replica import Replica
from fastddp.ddp.start import broadcast_model
from fastddp.device.compiler import untraced


@untraced
def before_forward(joinable: Joinable, replica: Replica, by_initial_world_size: bool) -> None:
    """Does what the context requires before a forward of a rank that still has inputs. Collective.

    Args:
        joinable: the wrapper of the model.
        replica: this rank's copy of the model.
        by_initial_world_size: divide gradients by the number of all ranks, not of those that still
            have inputs.

    Raises:
        RuntimeError: if another rank has run out and the context is told to stop then.
    """
    replica.begin()
    if torch.is_grad_enabled():
        replica.refuse_in_flight("a forward inside join")
    replica.settle_news()
    work = Join.notify_join_context(joinable)
    if work is not None and not by_initial_world_size:
        with waiting(replica.live_group, "join: counting the ranks that still have inputs"):
            replica.divisor = work.get_future().wait()[0].item()
    replica.notice_change()
    replica.meet()
    buffers = replica.buffers_due()
    if buffers:
        replica.buffers.broadcast(buffers, replica.ranks, _common_rank(replica, has_inputs=True))
    replica.decides_at_forward = True  # the ranks that have run out are told now
    # As they will have it: after a forward without grad mode nothing else would say so here.
    replica.buffers.sync_next = _agree_to_sync(replica, replica.sync and torch.is_grad_enabled())


class ReplicaJoinHook(JoinHook):
    """Stands in for a rank that has run out of inputs.

    Args:
        replica: the rank's copy of the model.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        # The rank's own gradients, once it has run out of inputs.
        self._own: dict[nn.Parameter, torch.Tensor | None] | None = None

    def main_hook(self) -> None:
        """Takes part in a forward and backward of the other ranks. Collective."""
        replica = self._replica
        replica.begin()
        replica.refuse_in_flight("join: the end of this rank's inputs")
        replica.settle_news()
        replica.notice_change()
        replica.meet()
        if self._own is None:
            grads = {param: param.grad for param in replica.module.parameters()}
            self._own = {p: None if grad is None else grad.clone() for p, grad in grads.items()}
        buffers = replica.buffers_due()
        if buffers:
            replica.buffers.broadcast(
                buffers, replica.ranks, _common_rank(replica, has_inputs=False)
            )
        sync = _agree_to_sync(replica, False)
        replica.buffers.sync_next = sync
        if sync:
            replica.shadow()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Gives every rank the model of one that has seen all inputs. Collective.

        Args:
            is_last_joiner: whether this rank is one of those that ran out last.
        """
        replica = self._replica
        replica.begin()
        replica.refuse_in_flight("join: its end")
        replica.settle_news()
        replica.meet()
        replica.divisor = None
        replica.decides_at_forward = False
        for param, grad in (self._own or {}).items():
            param.grad = grad  # or the next backward would add to that of the others
        root = _common_rank(replica, has_inputs=is_last_joiner)
        replica.authoritative_rank = root
        broadcast_model(replica.model, replica.ranks, root, call="join: the end")


def _common_rank(replica: Replica, *, has_inputs: bool) -> int:
    """Returns the last of the ranks for which the condition holds."""
    rank = replica.live_group.rank() if has_inputs else -1
    return int(_all_reduce(replica, rank, ReduceOp.MAX, "agreeing on a rank with inputs"))


def _agree_to_sync(replica: Replica, mine: bool) -> bool:
    return _all_reduce(replica, float(mine), ReduceOp.SUM, "agreeing whether to average") != 0


def _all_reduce(replica: Replica, value: float, op: ReduceOp.RedOpType, what: str) -> float:
    tensor = torch.tensor([value], device=replica.device)
    with waiting(replica.live_group, f"join: {what}"):
        wait_for(replica.live_group.allreduce(tensor, op), replica.live_group, tensor.device)
        return float(tensor.item())

"""The ranks' tensors, gathered.

The functions use the methods of :class:`torch.distributed.ProcessGroup` alone, so that any group
will do, also one that torch's registry does not know.
"""

from __future__ import annotations

import torch
from torch.distributed import GatherOptions, ProcessGroup

from fastddp.comm.loans import Loan, settle
from fastddp.comm.patience import wait_for
from fastddp.comm.waiting import waiting


def all_gather(group: ProcessGroup, mine: torch.Tensor, call: str) -> list[torch.Tensor]:
    """Returns the ranks' tensors, by rank, on every rank. Collective.

    Args:
        group: the ranks that take part.
        mine: this rank's tensor: dense and contiguous, of the same shape and dtype on every rank.
            It is sent without autograd.
        call: the name of the call in messages, see :class:`fastddp.comm.waiting.waiting`.

    Raises:
        torch.distributed.DistBackendError: if the ranks do not meet within the group's timeout.
    """
    with waiting(group, call):
        return all_gather_unnamed(group, mine)


def all_gather_unnamed(group: ProcessGroup, mine: torch.Tensor) -> list[torch.Tensor]:
    """Does what :func:`all_gather` does, for a caller that names the wait itself. Collective."""
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    loans = [Loan(tensor) for tensor in (mine, *gathered)]
    wait_for(group.allgather([gathered], [mine]), group, mine.device)
    settle(loans)
    return gathered


def gather(group: ProcessGroup, mine: torch.Tensor, dst: int, call: str) -> list[torch.Tensor]:
    """Returns the ranks' tensors, by rank, on rank ``dst`` of the group; else nothing. Collective.

    Args:
        group: the ranks that take part.
        mine: this rank's tensor, as for :func:`all_gather`.
        dst: the rank, within the group, that receives the tensors; the same on every rank.
        call: the name of the call in messages.

    Raises:
        torch.distributed.DistBackendError: if the ranks do not meet within the group's timeout.
    """
    gathered = [torch.empty_like(mine) for _ in range(group.size())] if group.rank() == dst else []
    loans = [Loan(tensor) for tensor in (mine, *gathered)]
    options = GatherOptions()
    options.rootRank = dst
    with waiting(group, call):
        # Without a name for the work: it refers to the tensors, and the loans end below.
        wait_for(group.gather([gathered] if gathered else [], [mine], options), group, mine.device)
    settle(loans)
    return gathered

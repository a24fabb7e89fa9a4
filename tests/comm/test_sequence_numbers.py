"""Torch compares the sequence numbers of groups: every launch is counted once."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.comm.calls import wait_for
from tests.comm.common import not_gloo, run_group
from tests.ranks import scratch_folder


def _numbers_agree(rank: int, world_size: int) -> None:
    """Torch's own check of what ranks do compares the groups' sequence numbers, on gloo."""
    for _ in range(12):
        works = [dist.all_reduce(torch.ones(4), async_op=True) for _ in range(3)]
        dist.reduce(torch.ones(4), 0)
        for work in works:
            work.wait()
    dist.all_reduce(torch.ones(4))


@not_gloo
def test_debug_mode_finds_no_mismatch_where_there_is_none(backend, monkeypatch):
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    run_group(_numbers_agree, 2, backend)


def _launches_are_counted(rank: int, world_size: int) -> None:
    group = dist.new_group()
    backend = group._get_backend(torch.device("cpu"))
    before = backend._get_sequence_number_for_group()
    if rank == 0:  # nobody else has come to any of them
        works = [dist.all_reduce(torch.ones(4), group=group, async_op=True) for _ in range(3)]
        works.append(dist.reduce(torch.ones(4), 0, group=group, async_op=True))
        assert backend._get_sequence_number_for_group() == before + 4
        (scratch_folder() / "counted").touch()
        for work in works:
            work.wait()
    else:
        wait_for([scratch_folder() / "counted"])
        for _ in range(3):
            dist.all_reduce(torch.ones(4), group=group)
        dist.reduce(torch.ones(4), 0, group=group)
        assert backend._get_sequence_number_for_group() == before + 4


@not_gloo
def test_sequence_numbers_count_launches(backend):
    run_group(_launches_are_counted, 2, backend)

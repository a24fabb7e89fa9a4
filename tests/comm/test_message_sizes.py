"""A message of another size than the receiver expects is an error on both ranks."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.comm.calls import DEADLINE_S, wait_for
from tests.comm.common import not_gloo, run_group
from tests.ranks import scratch_folder


def _message(rank: int, sent: int, received: int, first: str, tag: int) -> str:
    """Rank 0 sends to rank 1; returns what this rank is told."""
    group = dist.new_group(timeout=timedelta(seconds=60))
    dist.barrier(group)
    began = time.monotonic()
    is_first = (first == "sender") == (rank == 0)
    name = scratch_folder() / f"{sent}-{received}-{first}"
    if not is_first:
        wait_for([name])

    def exchange() -> None:
        if rank == 0:
            work = dist.isend(torch.ones(sent), 1, group, tag)
        else:
            work = dist.irecv(torch.zeros(received), 0, group, tag)
        name.touch()
        work.wait()

    with pytest.raises(RuntimeError) as caught:
        exchange()
    assert time.monotonic() - began < DEADLINE_S
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1), group=group)
    return str(caught.value)


def _messages(rank: int, world_size: int) -> list[str]:
    said = []
    for sent, received in ((4, 8), (8, 4), (4, 0), (0, 4), (1_000_000, 999_999)):
        for first in ("sender", "receiver"):
            said.append(_message(rank, sent, received, first, sent % 3))
    # Sizes that differ are no error where the order, the tag or the sender is another.
    group = dist.new_group()
    if rank == 0:
        works = [dist.isend(torch.full((n,), n + 0.0), 1, group, n) for n in (3, 2, 1)]
        works += [dist.isend(torch.full((n,), n + 0.0), 1, group, 9) for n in (4, 5)]
    else:
        tensors = [torch.zeros(n) for n in (1, 2, 3, 4, 5)]
        works = [dist.irecv(x, 0, group, min(len(x), 9)) for x in tensors[:3]]
        works += [dist.irecv(x, 0, group, 9) for x in tensors[3:]]
    for work in works:
        work.wait()
    if rank == 1:
        assert all(bool((x == len(x)).all()) for x in tensors)
    # A receiver from anybody cannot know the size; what comes after it is right all the same.
    for n in range(40):
        x = torch.full((n,), 1.0 * n)
        if rank == 0:
            dist.send(x, 1, group, 5)
        else:
            y = torch.zeros(n)
            dist.recv(y, None if n % 3 == 1 else 0, group, tag=5)
            assert torch.equal(x, y)
    with pytest.raises((ValueError, RuntimeError)):  # refused, so it was no message
        dist.send(torch.ones(3), 1, group, tag=-1)
    dist.barrier(group)
    return said


@not_gloo
def test_messages_of_another_size_are_an_error(backend):
    by_rank = run_group(_messages, 2, backend, timeout=12.0)
    sizes = [s for s in ((4, 8), (8, 4), (4, 0), (0, 4), (1_000_000, 999_999)) for _ in range(2)]
    for said in by_rank:
        for text, (sent, received) in zip(said, sizes, strict=True):
            assert (
                f"the ranks do not agree: with tag {sent % 3}, rank 0 sends {4 * sent} bytes to "
                f"rank 1, which receives {4 * received}" in text
            ), text

"""A rank that dies or stops in a backward: the others get an error that says where, and no hang."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from tests.ranks import Died, run_ranks

GROUP_TIMEOUT_S = 4.0


def _lose_rank_1(rank: int, world_size: int, engine: str, with_signal: int) -> str:
    """Rank 1 sends itself a signal in the middle of its third backward; rank 0 says what it saw."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1))
    group = dist.new_group(timeout=timedelta(seconds=GROUP_TIMEOUT_S))
    wrapped = fastddp.wrap(model, engine=engine, bucket_cap_mb=1e-6, process_group=group)
    pids: list[int | None] = [None] * world_size
    dist.all_gather_object(pids, os.getpid())

    def lose(_: torch.Tensor) -> None:
        if rank == 1:
            os.kill(os.getpid(), with_signal)

    for step in range(3):
        hidden = model[0](torch.ones(4, 8)) if step == 2 else None
        if hidden is None:
            wrapped(torch.ones(4, 8)).sum().backward()
            continue
        hidden.register_hook(lose)  # the last layer's buckets are launched, the first one's are not
        began = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            model[2](model[1](hidden)).sum().backward()
        assert time.monotonic() - began < 5 * GROUP_TIMEOUT_S
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[1], signal.SIGKILL)  # a stopped one would stay for ever
    return str(caught.value)


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_are_told_the_rank_the_bucket_and_its_parameters(engine, with_signal):
    message, died = run_ranks(_lose_rank_1, 2, engine, int(with_signal), expect_dead=[1])
    assert died == Died(-signal.SIGKILL)
    # Which bucket is still under way when the rank goes is a matter of timing.
    what = r"the all-reduce of bucket [1-6] of 6 \('[012]\.(weight|bias)'\) failed: ."
    assert re.match(f"fastddp: rank 0: {what}", message), message


def _destroy_then_train(rank: int, world_size: int, engine: str) -> None:
    wrapped = fastddp.wrap(nn.Linear(2, 2), engine=engine)
    wrapped(torch.ones(1, 2)).sum().backward()
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="process group of this model was destroyed before its"):
        wrapped(torch.ones(1, 2)).sum().backward()


def test_training_after_the_group_was_destroyed_is_an_error_not_a_hang(engine):
    run_ranks(_destroy_then_train, 2, engine)

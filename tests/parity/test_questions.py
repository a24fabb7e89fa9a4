"""Questions from other threads, hooks and signal handlers never wait for a round."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastddp
from tests.ranks import run_ranks

TRANSPORTS = {"shm": {}, "gloo": {"FASTDDP_SHM": "0"}}


def _ask(model: fastddp.DistributedDataParallel) -> list[object]:
    """Asks all that may be asked at any time."""
    return [
        model.stats().rounds,
        str(model.stats()),
        len(model.plan().buckets),
        repr(model),
        sorted(model.state_dict()),
        model.device,
        model.require_backward_grad_sync,
        model.reducer,
        model._has_rebuilt_buckets,
        model._get_ddp_logging_data()["iteration"],
    ]


def _model(engine: str) -> fastddp.DistributedDataParallel:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return fastddp.wrap(net, engine=engine, bucket_cap_mb=1e-5)


def _from_a_callback(rank: int, world_size: int, engine: str) -> list[int]:
    model = _model(engine)
    asked: list[int] = []

    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()

        def then(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            asked.append(len(_ask(model)))
            return done.value()[0]

        return future.then(then)

    model.register_comm_hook(None, hook)
    for _ in range(3):
        model.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
    return asked


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_hooks_callback_may_ask(engine: str, transport: str) -> None:
    for asked in run_ranks(_from_a_callback, 2, engine, env=TRANSPORTS[transport]):
        assert len(asked) == 12  # four buckets in three rounds
        assert set(asked) == {10}


def _while_it_waits(rank: int, world_size: int, engine: str, who: str) -> int:
    """Rank 0 waits in a round that rank 1 comes to only once rank 0 has had its answers."""
    model = _model(engine)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
    answers: list[list[object]] = []
    if rank == 1:
        dist.barrier()  # of the script's own group, whatever the gradients go through
    elif who == "thread":

        def ask() -> None:
            time.sleep(0.3)  # by now the main thread waits
            answers.append(_ask(model))
            dist.barrier()

        thread = threading.Thread(target=ask)
        thread.start()
    else:  # a signal is handled in the main thread, when it runs Python again: in a gradient's hook
        signal.signal(signal.SIGALRM, lambda *_: answers.append(_ask(model)))
        first = model.module[0].weight
        first.register_hook(lambda _: (os.kill(os.getpid(), signal.SIGALRM), time.sleep(0.01))[0])
        dist.barrier()
    model(torch.ones(2, 4)).sum().backward()
    if rank == 0 and who == "thread":
        thread.join()
    return len(answers)


@pytest.mark.parametrize("who", ["thread", "signal"])
def test_others_get_answers_while_a_round_waits(engine: str, who: str) -> None:
    assert run_ranks(_while_it_waits, 2, engine, who, env=TRANSPORTS["shm"]) == [1, 0]


def _watched(rank: int, world_size: int, engine: str) -> int:
    """A monitoring thread asks all the time."""
    model = _model(engine)
    over = threading.Event()
    count = 0

    def watch() -> None:
        nonlocal count
        while not over.is_set():
            _ask(model)
            count += 1

    thread = threading.Thread(target=watch)
    thread.start()
    for step in range(30):
        model.zero_grad()
        model(torch.full((2, 4), float(step + rank))).sum().backward()
        assert model.module[1].bias.grad.tolist() == [2.0] * 4, "one for each of the batch"
    over.set()
    thread.join()
    return count


def test_a_monitoring_thread_does_not_disturb(engine: str) -> None:
    assert all(run_ranks(_watched, 2, engine))

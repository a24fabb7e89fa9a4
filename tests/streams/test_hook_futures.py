"""A hook's future on a device: one that is completed late is waited for, but not for ever."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastddp.engine.hooks import GradBucket
from tests.ranks import run_ranks
from tests.streams import device
from tests.streams.group import RecordingGroup
from tests.streams.programs import Layers, Trained


class Impatient(RecordingGroup):
    """Has a timeout, of half a second."""

    def _get_backend(self, _device: torch.device) -> Any:
        timeout = timedelta(seconds=0.5)
        return SimpleNamespace(
            options=SimpleNamespace(_timeout=timeout), supports_tensor_alloc=lambda _: False
        )


def _future() -> torch.futures.Future[torch.Tensor]:
    return torch.futures.Future(devices=[torch.device(device.NAME, 0)])


def _late(_: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Communicates nothing: all ranks hold what this one holds."""
    future = _future()

    def complete() -> None:
        time.sleep(0.02)
        future.set_result(bucket.buffer())

    threading.Thread(target=complete).start()
    return future


def _never(_: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    return _future()


def _with_hooks(rank: int, world_size: int, engine: str) -> None:
    device.load()
    late = Trained(engine, Layers(), group=Impatient(size=4))
    late.model.register_comm_hook(None, _late)
    late.rounds()
    late.compare()
    never = Trained(engine, Layers(), group=Impatient(size=4))
    never.model.register_comm_hook(None, _never)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"communication hook.*bucket 1.*0\.5 s.*set_result"):
            never.backward()


def test_futures_of_hooks_on_a_device(engine: str) -> None:
    run_ranks(_with_hooks, 1, engine, init_group=False)

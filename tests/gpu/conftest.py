"""A group of one rank on NCCL, and wrappers that work in it as among many."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from fastddp.ddp import ranks
from tests.gpu.common import BACKEND, DEVICE


@pytest.fixture(scope="module")
def _group() -> Iterator[None]:
    torch.cuda.set_device(DEVICE)
    dist.init_process_group(
        BACKEND, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60)
    )
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_rank(_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a world of one rank averaged like any other, which is a copy: a sum of one, by one."""

    def is_alone(group: ProcessGroup | None) -> bool:
        return group is None

    monkeypatch.setattr(ranks, "is_alone", is_alone)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Make it an error to have the host wait for the device, between `forbid` and the end."""
    yield
    torch.cuda.set_sync_debug_mode("default")

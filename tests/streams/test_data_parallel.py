"""`DataParallel` on two stand-in devices: each reads a tensor only once it is there.

The values are compared as well, with the same pieces on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastddp
from fastddp.data_parallel import fan, stand_ins
from tests.models import CASES, loss_of
from tests.ranks import run_ranks
from tests.slow import slow_but_for
from tests.streams import device

# The stand-in device has no convolution.
NAMES = [name for name, case in CASES.items() if not case.has_batch_norm]
DEVICES = [f"{device.NAME}:{index}" for index in range(2)]
STEPS = 3


@contextlib.contextmanager
def streams_of_its_own() -> Iterator[None]:
    """Run the body, as a program may, on streams that it has made on both devices."""
    made = [device.stream(f"side {index}", index) for index in range(2)]
    for index, one in enumerate(made):
        one.wait_stream(torch.accelerator.current_stream(torch.device(DEVICES[index])))
    before = [torch.accelerator.current_stream(torch.device(name)) for name in DEVICES]
    with made[1], made[0]:
        yield
    for stream, one in zip(before, made, strict=True):
        stream.wait_stream(one)


def train(name: str, devices: Sequence[str], own_streams: bool = False) -> list[Tensor | None]:
    """Take some steps on replicas on the devices; return all gradients and buffers, on the CPU."""
    case = CASES[name]
    module = case.build().to(devices[0])
    if name == "transformer":  # the move has made two of the one; no GPU's does
        module.head.weight = module.embed.weight
    model = fastddp.DataParallel(module, devices)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    seen: list[Tensor | None] = []
    with streams_of_its_own() if own_streams else contextlib.nullcontext():
        for step in range(STEPS):
            inputs = [x.to(devices[0]) for x in case.whole_batch(2, step)]
            optimizer.zero_grad()
            loss_of(model(*inputs)).backward()
            seen += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            optimizer.step()
        seen += [buffer.clone() for buffer in model.buffers()]
        return [None if tensor is None else tensor.cpu() for tensor in seen]


def _train_all(rank: int, world_size: int, devices: Sequence[str], own_streams: bool) -> None:
    device.load()
    with mock.patch.object(stand_ins, "_BUCKET_BYTES", 500):
        for name in NAMES:
            want = train(name, ["cpu"] * len(devices))
            got = train(name, devices, own_streams)
            # Between packed tensors lies what nobody has written, and moves along with them. That
            # all else was written is seen by the values: fresh memory holds NaN.
            found = [f for f in device.findings() if f.kind != "uninitialised read"]
            assert found == [], name
            for mine, due in zip(got, want, strict=True):
                assert (mine is None) == (due is None), name
                if mine is not None:
                    torch.testing.assert_close(mine, due, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "own_streams", slow_but_for([True], [False, True]), ids=["default streams", "own streams"]
)
@pytest.mark.parametrize(
    "devices", [DEVICES, [DEVICES[0], DEVICES[1], DEVICES[1]]], ids=["two", "three replicas"]
)
def test_nothing_is_read_before_it_is_there(devices: list[str], own_streams: bool) -> None:
    run_ranks(_train_all, 1, devices, own_streams, init_group=False)


def _host_syncs(rank: int, world_size: int) -> list[str]:
    device.load()
    train("mlp", DEVICES)
    return [sync.where for sync in device.host_syncs() if sync.in_backward]


def test_the_host_does_not_wait_in_backward() -> None:
    assert run_ranks(_host_syncs, 1, init_group=False) == [[]]


def _train_without_order(rank: int, world_size: int) -> list[str]:
    @contextlib.contextmanager
    def nothing(device: torch.device, grads: Sequence[Any]) -> Iterator[None]:
        yield

    device.load()
    with mock.patch.object(fan, "_behind", nothing):
        train("mlp", DEVICES, own_streams=True)
    return [found.kind for found in device.findings()]


def test_this_would_be_seen() -> None:
    [kinds] = run_ranks(_train_without_order, 1, init_group=False)
    assert "race" in kinds

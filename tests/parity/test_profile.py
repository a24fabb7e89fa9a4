"""What a torch profile of a step shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastddp
from tests.ranks import run_ranks


def _profiled(rank: int, world_size: int, transport: str, engine: str) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(40, 90))
    ours = fastddp.DistributedDataParallel(model, engine=engine, bucket_cap_mb=1e-3)
    x = torch.ones(4, 30)
    for _ in range(3):  # both plans, and the choice of when to launch
        ours(x).sum().backward()
    with torch.profiler.profile(record_shapes=True) as profile:
        for _ in range(2):
            ours(x).sum().backward()
    events = profile.events()
    by_name = {name: [e for e in events if e.name == name] for name in {e.name for e in events}}
    (forward, _) = by_name["DistributedDataParallel.forward"]
    inside = {e.name for e in _below(forward)}
    assert {"aten::linear", "c10d::broadcast_"} <= inside, "buffers and the model are in it"

    assert len(by_name["fastddp.reducer::finish_round"]) == 2
    filled = by_name["fastddp.reducer::fill_bucket"]
    assert len(filled) == 2 * len(ours.plan().buckets)
    if engine == "native":
        sizes = sorted(e.input_shapes for e in filled)
        assert sizes == sorted([[bucket.numel]] for bucket in ours.plan().buckets for _ in range(2))
    sizes = [e.input_shapes for e in by_name[f"{transport}:all_reduce"]]
    buckets = [[[bucket.numel]] for bucket in ours.plan().buckets]
    assert len(buckets) > 1
    assert sorted(sizes) == sorted(buckets * 2)
    assert len(by_name[f"{transport}:broadcast"]) >= 2


def _below(event: torch.autograd.profiler_util.FunctionEvent) -> list[object]:
    return [e for child in event.cpu_children for e in (child, *_below(child))]


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_forwards_and_collectives_with_sizes(transport: str, engine: str) -> None:
    env = {"FASTDDP_SHM": "1" if transport == "shm" else "0"}
    run_ranks(_profiled, 2, transport, engine, env=env)

"""What both classes say of themselves, they say alike."""

from __future__ import annotations

import torch
from torch import nn

import fastddp
from tests.ranks import run_ranks


def logging_data_of_both(rank: int, world_size: int, engine: str) -> None:
    def model() -> nn.Module:
        model = nn.Sequential(nn.Linear(300, 400), nn.BatchNorm1d(400), nn.Linear(400, 900))
        model[0].bias.requires_grad_(False)
        return model

    for options in (
        {},
        {"bucket_cap_mb": 0.5, "forward_sync_buffers": False},
        {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    ):
        ours = fastddp.DistributedDataParallel(model(), engine=engine, **options)
        theirs = nn.parallel.DistributedDataParallel(model(), **options)
        got, want = ours._get_ddp_logging_data(), theirs._get_ddp_logging_data()
        # Torch's first plan is one of other buckets, until it has seen in what order they fill.
        sizes, want_sizes = got.pop("bucket_sizes"), want.pop("bucket_sizes")
        assert sum(map(int, sizes.split(", "))) == sum(map(int, want_sizes.split(", ")))
        for name in set(got) & set(want):
            assert got[name] == want[name], (name, got[name], want[name], options)
        assert set(got) - set(want) == {"static_graph"}

    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    assert fastddp.DistributedDataParallel(convert(model()))._get_ddp_logging_data()["has_sync_bn"]


def test_logging_data_is_that_of_torch(engine: str) -> None:
    run_ranks(logging_data_of_both, 2, engine)


def attributes_of_both(rank: int, world_size: int, engine: str) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))
    for options in ({"device_mesh": mesh}, {"device_mesh": mesh, "bucket_cap_mb_list": [1, 2]}):
        ours = fastddp.DistributedDataParallel(nn.Linear(2, 2), engine=engine, **options)
        theirs = nn.parallel.DistributedDataParallel(nn.Linear(2, 2), **options)
        for name in ("device_mesh", "bucket_bytes_cap_list", "broadcast_bucket_size"):
            assert getattr(ours, name) == getattr(theirs, name), name


def test_attributes_are_those_of_torch(engine: str) -> None:
    run_ranks(attributes_of_both, 2, engine)

"""The sampler: torch's order for wrap and drop, every sample exactly once for none."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch.utils.data
from hypothesis import given, settings
from hypothesis import strategies as st

import fastddp
from fastddp import DistributedSampler
from tests.ranks import LAUNCHER_VARIABLES, run_ranks

lengths = st.integers(0, 40)
worlds = st.integers(1, 9)
seeds = st.integers(0, 5)
untimed = settings(deadline=None)  # of a single example: machines are busy
PADS = ("wrap", "none", "drop")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def shares(length: int, world: int, epoch: int = 0, **options: object) -> list[list[int]]:
    """What each rank gets, which must be as long as its sampler says."""
    result = []
    for rank in range(world):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pad="drop" may leave nothing
            sampler = DistributedSampler(range(length), world, rank, **options)
        sampler.set_epoch(epoch)
        result.append(list(sampler))
        assert len(result[-1]) == len(sampler)
    return result


def torch_shares(length: int, world: int, epoch: int, **options: object) -> list[list[int]]:
    samplers = [
        torch.utils.data.DistributedSampler(range(length), world, rank, **options)  # type: ignore
        for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in samplers]


@untimed
@given(length=lengths, world=worlds, seed=seeds, epoch=seeds, shuffle=st.booleans())
def test_none_gives_every_sample_exactly_once(length, world, seed, epoch, shuffle):
    by_rank = shares(length, world, epoch, seed=seed, shuffle=shuffle, pad="none")
    assert Counter(i for share in by_rank for i in share) == Counter(range(length))
    sizes = [len(share) for share in by_rank]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@untimed
@given(length=lengths, world=worlds, seed=seeds, epoch=seeds, shuffle=st.booleans())
def test_wrap_and_drop_are_torchs(length, world, seed, epoch, shuffle):
    options = {"seed": seed, "shuffle": shuffle}
    wrapped = torch_shares(length, world, epoch, **options)
    dropped = torch_shares(length, world, epoch, drop_last=True, **options)
    assert shares(length, world, epoch, **options) == wrapped
    assert shares(length, world, epoch, pad="wrap", **options) == wrapped
    assert shares(length, world, epoch, drop_last=True, **options) == dropped
    assert shares(length, world, epoch, pad="drop", **options) == dropped


@untimed
@given(length=lengths, world=worlds, seed=seeds, epoch=seeds)
def test_none_has_the_order_of_wrap_without_the_padding(length, world, seed, epoch):
    """Interleaved again, the ranks' shares are the one order that they were cut from."""
    unpadded = shares(length, world, epoch, seed=seed, pad="none")
    wrapped = shares(length, world, epoch, seed=seed)
    assert [unpadded[k % world][k // world] for k in range(length)] == [
        wrapped[k % world][k // world] for k in range(length)
    ]


def test_a_dataset_smaller_than_the_world():
    assert shares(2, 4, shuffle=False, pad="none") == [[0], [1], [], []]
    assert shares(2, 4, shuffle=False, pad="wrap") == [[0], [1], [0], [1]]
    with pytest.warns(UserWarning, match=r"4 rank.*'drop' leaves no sample of a dataset of 2"):
        assert list(DistributedSampler(range(2), 4, 0, pad="drop")) == []


def test_it_is_torchs_class_and_feeds_a_loader():
    sampler = DistributedSampler(range(5), 2, 1, shuffle=False, pad="none")
    assert isinstance(sampler, torch.utils.data.DistributedSampler)
    loader = torch.utils.data.DataLoader(range(5), batch_size=2, sampler=sampler)  # type: ignore
    assert [batch.tolist() for batch in loader] == [[1, 3]]


# --- where world size and rank come from ----------------------------------------------------------


@pytest.mark.parametrize("pad", PADS)
def test_a_plain_process_gets_everything(pad):
    sampler = DistributedSampler(range(5), shuffle=False, pad=pad)
    assert list(sampler) == [0, 1, 2, 3, 4]
    assert (sampler.num_replicas, sampler.rank) == (1, 0)


def test_a_launchers_environment_is_asked_before_there_is_a_group(monkeypatch):
    for name, value in {
        "RANK": "2",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert list(DistributedSampler(range(8), shuffle=False, pad="none")) == [2, 5]
    assert list(DistributedSampler(range(8), 8, shuffle=False)) == [2]


def _group_share(rank: int, world_size: int) -> list[int]:
    return list(fastddp.DistributedSampler(range(5), shuffle=False, pad="none"))


def test_the_group_is_asked_first():
    misleading = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    assert run_ranks(_group_share, 2, env=misleading) == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": "zero"}, "pad='zero' is not one of 'wrap', 'none', 'drop'"),
        ({"pad": "wrap", "drop_last": True}, "drop_last=True contradicts pad='wrap'"),
        ({"pad": "none", "drop_last": True}, "drop_last=True contradicts pad='none'"),
        ({"num_replicas": 0}, "num_replicas=0, less than 1"),
        ({"num_replicas": 3}, "which of num_replicas=3 ranks is this.*pass rank too"),
        ({"num_replicas": 3, "rank": 3}, r"rank=3 is not in 0 ... num_replicas-1 = 2"),
        ({"num_replicas": 3, "rank": -1}, "rank=-1 is not in"),
        ({"rank": 1}, "rank=1 is not in 0 ... num_replicas-1 = 0; pass both"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DistributedSampler(range(4), **options)


def test_half_an_environment_is_an_error_too(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError, match="half a process group: RANK=1"):
        DistributedSampler(range(4))


# --- set_epoch ------------------------------------------------------------------------------------


def test_a_forgotten_set_epoch_is_warned_about_once_by_rank_0():
    sampler, quiet = (DistributedSampler(range(8), 2, rank) for rank in range(2))
    first = list(sampler)
    with pytest.warns(UserWarning, match=r"2 rank\(s\): a second pass.*set_epoch\(epoch\)"):
        assert list(sampler) == first
    assert list(sampler) == first
    assert list(quiet) == list(quiet)


@pytest.mark.parametrize("how", ["set_epoch", "attribute", "in order"])
def test_no_warning_where_nothing_was_forgotten(how):
    sampler = DistributedSampler(range(8), 2, 0, shuffle=how != "in order")
    for epoch in range(3):
        if how == "set_epoch":
            sampler.set_epoch(epoch)
        elif how == "attribute":
            sampler.epoch = epoch
        assert len(list(sampler)) == 4


def test_set_epoch_gives_another_order_of_the_same_samples():
    first, second = shares(20, 1, 0)[0], shares(20, 1, 1)[0]
    assert first != second
    assert sorted(first) == sorted(second)

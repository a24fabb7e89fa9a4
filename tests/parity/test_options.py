"""Options and environments, those that are refused and those that are accepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel.distributed import _MixedPrecision

import fastddp
from tests.models import CASES, Ladder, loss_of
from tests.parity.checks import assert_ladder, digest
from tests.parity.wrapping import UNFIT
from tests.ranks import run_ranks


def _one_bucket(rank: int, world_size: int, engine: str) -> None:
    for options in ({"bucket_cap_mb": float("inf")}, {"bucket_cap_mb_list": [float("inf"), 1]}):
        model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(80)), nn.Linear(100, 1))  # 3 MiB
        ours = fastddp.DistributedDataParallel(model, engine=engine, **options)
        for step in range(2):
            ours.zero_grad()
            ours(torch.ones(1, 100) * 2 * rank * step).sum().backward()
            assert len(ours.plan().buckets) == 1
        ones = torch.ones_like(model[-1].bias.grad)
        assert torch.equal(model[-1].bias.grad, ones)
    assert ours._get_ddp_logging_data()["bucket_cap_bytes"] == 2**20


def test_a_bucket_without_a_limit_takes_all(engine: str) -> None:
    run_ranks(_one_bucket, 2, engine)


def _engine_from_environment(rank: int, world_size: int) -> list[str]:
    names = []
    for engine in (None, "python"):
        ours = fastddp.DistributedDataParallel(Ladder(), engine=engine)
        names.append(type(ours._replica.attachment.reducer).__name__)
    return names


def test_the_engine_is_the_keyword_or_the_environment(engine: str) -> None:
    (names,) = set(
        map(tuple, run_ranks(_engine_from_environment, 2, env={"FASTDDP_ENGINE": engine}))
    )
    assert names == (
        {"native": "NativeReducer", "python": "PythonReducer"}[engine],
        "PythonReducer",
    )


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_an_unknown_option_is_named_with_the_nearest_known_one(
    no_launcher: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(TypeError, match=r"'bucket_cap_mib'.*'bucket_cap_mb'"):
        fastddp.wrap(Ladder(), bucket_cap_mib=3)
    with pytest.raises(TypeError, match=r"'process_grup'.*'process_group'"):
        fastddp.wrap(Ladder(), process_grup=None)
    with pytest.raises(TypeError, match=r"'zzz'.*find_unused_parameters"):
        fastddp.wrap(Ladder(), zzz=1)
    with pytest.raises(TypeError, match="bucket_cap_mib"):
        fastddp.DistributedDataParallel(Ladder(), bucket_cap_mib=3)


def test_what_is_no_module_or_wrapped_already_is_refused(no_launcher: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"Module.*list"):
        fastddp.wrap([Ladder()])
    with pytest.raises(ValueError, match=r"already.*\.module"):
        fastddp.wrap(fastddp.wrap(Ladder()))


@pytest.mark.parametrize("what", UNFIT)
def test_unfit_models_are_refused_in_a_world_of_one(
    what: str, no_launcher: pytest.MonkeyPatch
) -> None:
    build, error, words = UNFIT[what]
    with pytest.raises(error) as caught:
        fastddp.wrap(build())
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "quantum"}, ["engine", "'quantum'", "native", "python"]),
        ({"bucket_cap_mb": 0}, ["bucket", "0"]),
        ({"bucket_cap_mb": -2}, ["bucket", "-2"]),
        ({"bucket_cap_mb": float("nan")}, ["bucket_cap_mb", "nan", "MiB"]),
        ({"bucket_cap_mb": float("-inf")}, ["bucket_cap_mb", "-inf"]),
        ({"bucket_cap_mb": "25"}, ["bucket_cap_mb", "'25'"]),
        ({"bucket_cap_mb": True}, ["bucket_cap_mb", "True"]),
        ({"bucket_cap_mb_list": [1, None]}, ["bucket_cap_mb_list", "None"]),
        ({"bucket_cap_mb_list": 25}, ["bucket_cap_mb_list", "25"]),
        ({"bucket_cap_mb_list": "25"}, ["bucket_cap_mb_list", "'25'"]),
        ({"bucket_cap_mb": 1, "bucket_cap_mb_list": [1]}, ["bucket_cap_mb", "bucket_cap_mb_list"]),
        ({"bucket_cap_mb_list": []}, ["bucket"]),
        ({"device_ids": [0]}, ["device_ids", "cpu"]),
        ({"output_device": 0}, ["output_device", "cpu"]),
        ({"process_group": "world"}, ["process_group", "'world'"]),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, Any], words: list[str], no_launcher: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        fastddp.wrap(Ladder(), **options)
    for word in words:
        assert word in str(caught.value)


def test_a_bad_engine_in_the_environment_is_refused(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("FASTDDP_ENGINE", "quantum")
    with pytest.raises(ValueError, match="FASTDDP_ENGINE='quantum'"):
        fastddp.wrap(Ladder())


def test_the_class_needs_a_group(no_launcher: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"init_process_group.*fastddp\.wrap"):
        fastddp.DistributedDataParallel(Ladder())


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]),
        ({"WORLD_SIZE": "2"}, ["RANK", "MASTER_ADDR", "MASTER_PORT"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR", "MASTER_PORT"]),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, ["MASTER_PORT"]),
    ],
)
def test_half_an_environment_is_refused(
    given: dict[str, str], missing: list[str], no_launcher: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        no_launcher.setenv(name, value)
    with pytest.raises(RuntimeError) as caught:
        fastddp.wrap(Ladder())
    text = str(caught.value)
    assert text.split("but not", 1)[1].split(".")[0].strip() == ", ".join(missing)
    for name, value in given.items():
        assert f"{name}={value}" in text
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("RANK", "one", "RANK='one'"), ("RANK", "2", "RANK=2"), ("WORLD_SIZE", "", "WORLD_SIZE=''")],
)
def test_a_senseless_environment_is_refused(
    name: str, value: str, says: str, no_launcher: pytest.MonkeyPatch
) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for key, text in (whole | {name: value}).items():
        no_launcher.setenv(key, text)
    with pytest.raises(RuntimeError, match=says):
        fastddp.wrap(Ladder())


def _not_a_member(rank: int, world_size: int, engine: str) -> None:
    group = dist.new_group([0, 1])
    if rank == 2:
        with pytest.raises(ValueError, match="member"):
            fastddp.DistributedDataParallel(Ladder(), process_group=group, engine=engine)
    else:
        ours = fastddp.DistributedDataParallel(Ladder(), process_group=group, engine=engine)
        ours(2.0 * (1 + rank)).backward()
        assert_ladder(ours.module, 3.0, "two of three")


def test_a_rank_outside_the_group_is_told_so(engine: str) -> None:
    run_ranks(_not_a_member, 3, engine)


def _torchs_arguments(rank: int, world_size: int, engine: str) -> list[str]:
    """Everything torch accepts on the CPU is accepted, and none of it changes a gradient."""
    case = CASES["mlp"]
    digests = []
    for options in (
        {},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"batched_grad_copy": True},
        {"skip_all_reduce_unused_params": True},
        {"check_reduction": True},
        {"dim": 1},
        {"device_ids": None, "output_device": None},
        {"device_ids": []},
        {"bucket_cap_mb": 1},
        {"bucket_cap_mb_list": [1, 2, 3]},
        {"process_group": dist.group.WORLD},
        {"device_mesh": torch.distributed.init_device_mesh("cpu", (world_size,))},
        {"init_sync": False},
        {"broadcast_buffers": True},
        {"forward_sync_buffers": True},
        {"mixed_precision": None},
        {"mixed_precision": _MixedPrecision()},
        {"delay_all_reduce_named_params": None, "param_to_hook_all_reduce": None},
    ):
        ours = fastddp.DistributedDataParallel(case.build(), engine=engine, **options)
        for step in range(2):
            ours.zero_grad()
            loss_of(ours(*case.inputs(rank, step))).backward()
        digests.append(digest({n: p.grad for n, p in ours.module.named_parameters()}))
    positional = fastddp.DistributedDataParallel(case.build(), None, None, 0, True, True)
    assert positional.broadcast_buffers is True
    return digests


def test_torchs_arguments_are_accepted(engine: str) -> None:
    by_rank = run_ranks(_torchs_arguments, 2, engine)
    assert len({d for digests in by_rank for d in digests}) == 1

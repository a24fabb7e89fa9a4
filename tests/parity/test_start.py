"""Starting: rank 0's values win, different models and bad input are refused on every rank alike."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP
from torch.nn.parallel.distributed import _MixedPrecision

import fastddp
from tests.models import CASES, Ladder, ladder_x, loss_of, mean_x
from tests.parity.checks import assert_ladder, assert_same_bits, digest
from tests.ranks import run_ranks

MAKES = ("DistributedDataParallel", "wrap")


# --- rank 0's values ------------------------------------------------------------------------------


def _rank_0_wins(rank: int, world_size: int, make_name: str, engine: str) -> None:
    make = getattr(fastddp, make_name)
    for case in CASES.values():
        model = case.build()
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.add_(rank)
        pointers = [p.data_ptr() for p in model.parameters()]
        make(model, engine=engine)
        assert_same_bits(model.state_dict(), case.build().state_dict(), case.name)
        assert [p.data_ptr() for p in model.parameters()] == pointers, "written in place"

    model = Ladder()
    with torch.no_grad():
        model.a.fill_(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # made before wrapping
    ours = make(model, engine=engine)
    ours(ladder_x(rank, 0, world_size)).backward()
    optimizer.step()
    assert model.a.unique().tolist() == [0.0 - mean_x(0, world_size)]


@pytest.mark.parametrize("make_name", MAKES)
def test_every_rank_starts_with_the_values_of_rank_0(make_name: str, engine: str) -> None:
    run_ranks(_rank_0_wins, 3, make_name, engine)


class Buffers(nn.Module):
    """Counts its forwards, adding something that differs by rank; the loss shows what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("sum", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flag", torch.zeros(2, dtype=torch.bool), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x: float) -> Tensor:
        seen = self.sum.clone()
        if self.training:
            self.sum += x
            self.count += 1
            self.flag.logical_not_()
        return self.weight.sum() * x + seen.sum()


def _buffers(rank: int, world_size: int, make_name: str, engine: str) -> None:
    make = getattr(fastddp, make_name)

    def fresh() -> Buffers:
        model = Buffers()
        model.sum.fill_(10.0 * (rank + 1))
        return model

    model = fresh()
    ours = make(model, engine=engine)
    assert model.sum.tolist() == [10.0] * 3, "rank 0's at the start"
    for step in range(3):
        ours(float(rank + 1)).backward()
        # Before each forward all have rank 0's: 10 + one for each forward of rank 0 before.
        assert model.sum.tolist() == [10.0 + step + rank + 1] * 3
        assert model.count.item() == step + 1
        assert model.flag.tolist() == [step % 2 == 0] * 2

    # As in torch: not under no_sync, nor in the first forward after it; see its require_forward_...
    theirs_model, ours_model = fresh(), fresh()
    theirs, ours = TorchDDP(theirs_model), make(ours_model, engine=engine)
    for sync in (True, False, False, True, True):
        for wrapped in (theirs, ours):
            with contextlib.nullcontext() if sync else wrapped.no_sync():
                wrapped(float(rank + 1)).backward()
            assert wrapped.require_forward_param_sync == sync
        assert_same_bits(
            dict(ours_model.named_buffers()), dict(theirs_model.named_buffers()), "as torch"
        )
    for wrapped in (theirs, ours):  # nor if it is told so
        wrapped.require_forward_param_sync = False
        wrapped(float(rank + 1)).backward()
        assert wrapped.require_forward_param_sync
    assert_same_bits(
        dict(ours_model.named_buffers()), dict(theirs_model.named_buffers()), "told so, as torch"
    )
    for value in (False, True):  # nor for as long as it is told so
        for name in ("broadcast_buffers", "forward_sync_buffers"):
            for wrapped in (theirs, ours):
                setattr(wrapped, name, value)
                wrapped(float(rank + 1)).backward()
                assert wrapped.forward_sync_buffers == wrapped.broadcast_buffers == value
            assert copy.deepcopy(ours).forward_sync_buffers == value
            assert_same_bits(
                dict(ours_model.named_buffers()), dict(theirs_model.named_buffers()), name
            )

    # Without grad mode never, unlike torch; the forward in grad mode after it makes up for that.
    model = fresh()
    ours = make(model, engine=engine)
    for mode in (torch.no_grad, torch.inference_mode):
        model.sum = torch.full((3,), 10.0 * rank)
        for train in (False, True):
            with mode():
                ours.train(train)(float(rank + 1))
        assert model.sum.tolist() == [11.0 * rank + 1] * 3
        ours._sync_buffers()
        assert model.sum.tolist() == [1.0] * 3
        model.sum = torch.full((3,), 10.0 * rank)
        ours(float(rank + 1)).backward()
        assert model.sum.tolist() == [1.0 + rank] * 3

    model = fresh()
    ours = make(model, engine=engine, broadcast_buffers=False)
    assert model.sum.tolist() == [10.0 * (rank + 1)] * 3, "neither at the start"
    ours(float(rank + 1)).backward()
    ours(float(rank + 1)).backward()
    assert model.sum.tolist() == [10.0 * (rank + 1) + 2 * (rank + 1)] * 3, "nor before forward"

    model = fresh()
    ours = make(model, engine=engine, forward_sync_buffers=False)
    assert model.sum.tolist() == [10.0] * 3, "at the start"
    ours(float(rank + 1)).backward()
    ours(float(rank + 1)).backward()
    assert model.sum.tolist() == [10.0 + 2 * (rank + 1)] * 3, "not before forward"

    model = fresh()
    with torch.no_grad():
        model.weight.fill_(rank)
    make(model, engine=engine, init_sync=False)
    assert model.sum.tolist() == [10.0 * (rank + 1)] * 3
    assert model.weight.tolist() == [float(rank)] * 2

    model = fresh()  # a buffer that is replaced, not written to, and one that changes its device id
    ours = make(model, engine=engine)
    for _ in range(2):
        model.sum = torch.full((3,), float(rank))
        ours(0.0).backward()
        assert model.sum.tolist() == [0.0] * 3


@pytest.mark.parametrize("make_name", MAKES)
def test_buffers_are_those_of_rank_0_before_each_forward(make_name: str, engine: str) -> None:
    run_ranks(_buffers, 2, make_name, engine)


def _ignored(rank: int, world_size: int, engine: str) -> None:
    model = Ladder()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(rank)
    TorchDDP._set_params_and_buffers_to_ignore_for_model(model, ["b", "d"])
    ours = fastddp.DistributedDataParallel(model, engine=engine)
    assert [p.unique().item() for p in model.parameters()] == [0, rank, 0, rank, 0]
    ours(ladder_x(rank, 0, world_size)).backward()
    mean, x = mean_x(0, world_size), ladder_x(rank, 0, world_size)
    assert_ladder(
        model, {"a": mean, "b": x, "c": mean, "d": x, "e": mean}, "ignored ones are local"
    )


def test_parameters_that_the_model_asks_to_ignore(engine: str) -> None:
    run_ranks(_ignored, 2, engine)


# --- mismatches -----------------------------------------------------------------------------------


def _net(**changes: Any) -> nn.Module:
    """One parameter after another, each of which a rank may have otherwise."""
    settings: dict[str, Any] = {
        "first": (2, 3),
        "second": (5,),
        "dtype": torch.float32,
        "extra": False,
        "frozen": False,
        "buffer": (4,),
    }
    settings |= changes
    model = nn.Module()
    model.first = nn.Parameter(torch.zeros(settings["first"]))
    model.second = nn.Parameter(torch.zeros(settings["second"], dtype=settings["dtype"]))
    model.second.requires_grad_(not settings["frozen"])
    if settings["extra"]:
        model.extra = nn.Parameter(torch.zeros(7))
    model.register_buffer("table", torch.zeros(settings["buffer"]))
    return model


MISMATCHES: dict[str, tuple[dict[str, Any], list[str]]] = {
    # what the odd rank changes, and what the error has to say
    "shape": ({"first": (3, 2)}, ["'first'", "(3, 2)", "(2, 3)"]),
    "numel": ({"first": (2, 4)}, ["'first'", "(2, 4)", "(2, 3)"]),
    "dtype": ({"dtype": torch.float64}, ["'second'", "torch.float64", "torch.float32"]),
    "one more": ({"extra": True}, ["'extra'", "(7,)"]),
    "requires_grad": ({"frozen": True}, ["'second'", "requires grad"]),
    "buffer": ({"buffer": (9,)}, ["'table'", "(9,)", "(4,)"]),
}


def _mismatch(rank: int, world_size: int, make_name: str, engine: str) -> dict[str, str]:
    make = getattr(fastddp, make_name)
    said = {}
    for odd in range(world_size):
        for what, (changes, _) in MISMATCHES.items():
            model = _net(**(changes if rank == odd else {}))
            with pytest.raises(fastddp.MismatchError) as caught:
                make(model, engine=engine)
            assert isinstance(caught.value, RuntimeError)
            said[f"{what}, rank {odd}"] = str(caught.value)
    ours = make(Ladder(), engine=engine)  # the group is as good as before
    ours(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(ours.module, mean_x(0, world_size), "after all that")
    return said


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("make_name", MAKES)
def test_models_that_differ_are_refused_on_every_rank(
    make_name: str, world_size: int, engine: str
) -> None:
    by_rank = run_ranks(_mismatch, world_size, make_name, engine)
    assert len(by_rank[0]) == len(MISMATCHES) * world_size
    for said in by_rank:
        assert said == by_rank[0], "all ranks say the same"
    for odd in range(world_size):
        for what, (_, words) in MISMATCHES.items():
            text = by_rank[0][f"{what}, rank {odd}"]
            # Seen from rank 0: when it is itself the odd one, rank 1 is the first that differs.
            for word in [*words, f"rank {odd or 1}", "rank 0"]:
                assert word in text, (what, odd, word, text)


def _strides_differ(rank: int, world_size: int, engine: str) -> None:
    """A broadcast of bytes would scramble the weights without a word."""
    case = CASES["cnn" if rank == 0 else "channels_last"]
    with pytest.raises(fastddp.MismatchError, match=r"rank 1.*conv1\.weight.*strides"):
        fastddp.DistributedDataParallel(case.build(), engine=engine)
    cap_mb = 1.0 + rank
    with pytest.raises(fastddp.MismatchError, match=r"bucket.*2 MiB on rank 1.*1 MiB on rank 0"):
        fastddp.DistributedDataParallel(Ladder(), engine=engine, bucket_cap_mb=cap_mb)
    cap_mb = float("inf") if rank == 0 else 1.0
    with pytest.raises(fastddp.MismatchError, match=r"bucket.*1 MiB on rank 1.*no limit on rank 0"):
        fastddp.DistributedDataParallel(Ladder(), engine=engine, bucket_cap_mb=cap_mb)
    for name in ("broadcast_buffers", "forward_sync_buffers"):
        with pytest.raises(fastddp.MismatchError, match=r"broadcast_buffers.*rank 1.*rank 0"):
            fastddp.DistributedDataParallel(Ladder(), engine=engine, **{name: rank == 0})
    embedding = nn.Embedding(3, 2, sparse=rank == 0)  # which decides over the plan
    with pytest.raises(fastddp.MismatchError, match=r"'weight' has .*, sparse gradient on rank 0"):
        fastddp.DistributedDataParallel(embedding, engine=engine)


def test_strides_and_options_that_differ_are_refused(engine: str) -> None:
    run_ranks(_strides_differ, 2, engine)


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


def _same_names_other_order(rank: int, world_size: int, engine: str) -> None:
    model = nn.Module()
    for name in "ab" if rank == 0 else "ba":
        model.register_parameter(name, nn.Parameter(torch.zeros(2)))
    with pytest.raises(fastddp.MismatchError, match="order"):
        fastddp.DistributedDataParallel(model, engine=engine)


def test_another_order_of_the_same_parameters_is_refused(engine: str) -> None:
    run_ranks(_same_names_other_order, 2, engine)


# --- one rank that cannot -------------------------------------------------------------------------


def _meta() -> nn.Module:
    return nn.Linear(2, 2, device="meta")


def _frozen() -> nn.Module:
    return Ladder().requires_grad_(False)


def _two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


def _integers() -> nn.Module:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Parameter(torch.ones(2))
            self.odd = nn.Parameter(torch.ones(2, dtype=torch.float8_e4m3fn))

    return Odd()


def _lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))


UNFIT: dict[str, tuple[Callable[[], nn.Module], type[Exception], list[str]]] = {
    "meta": (_meta, ValueError, ["'weight'", "meta", "to_empty"]),
    "two devices": (_two_devices, ValueError, ["meta", "1.weight"]),
    "frozen": (_frozen, RuntimeError, ["gradient", "Ladder"]),
    "dtype": (_integers, ValueError, ["'odd'", "float8_e4m3fn"]),
    "lazy": (_lazy, RuntimeError, ["'1.weight'", "uninitialized"]),
}


def _one_rank_cannot(rank: int, world_size: int, make_name: str, engine: str) -> None:
    make = getattr(fastddp, make_name)
    for what, (build, error, words) in UNFIT.items():
        for odd in (0, 1):
            with pytest.raises((error, fastddp.MismatchError)) as caught:
                make(build() if rank == odd else Ladder(), engine=engine)
            text = str(caught.value)
            for word in words:
                assert word in text, (what, odd, rank, text)
            if rank == odd:
                assert type(caught.value) is error, "its own error, not what the others are told"
            else:
                assert type(caught.value) is fastddp.MismatchError
                assert f"rank {odd}" in text
        with pytest.raises(error):  # and all of them
            make(build(), engine=engine)
    ours = make(Ladder(), engine=engine)
    ours(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(ours.module, mean_x(0, world_size), "after all that")


@pytest.mark.parametrize("make_name", MAKES)
def test_one_rank_that_cannot_wrap_its_model_stops_all(make_name: str, engine: str) -> None:
    run_ranks(_one_rank_cannot, 2, make_name, engine)


def _one_rank_has_a_bad_option(rank: int, world_size: int, make_name: str) -> None:
    """Options are checked before the ranks talk: the others must not wait for ever."""
    make = getattr(fastddp, make_name)
    for options, error in (
        ({"engine": "quantum"}, ValueError),
        ({"bucket_cap_mb": -1}, ValueError),
        ({"device_ids": [0]}, ValueError),
        ({"bucket_cap_mb_list": 5}, ValueError),
        # What Python itself says to nonsense is told too.
        ({"delay_all_reduce_named_params": 1, "param_to_hook_all_reduce": 1}, TypeError),
        ({"mixed_precision": _MixedPrecision(param_dtype="half")}, ValueError),
    ):
        with pytest.raises((error, fastddp.MismatchError)) as caught:
            make(Ladder(), **(options if rank == 1 else {}))
        assert (type(caught.value) is error) == (rank == 1), caught.value
    with pytest.raises((TypeError, fastddp.MismatchError)) as caught:
        make([Ladder()] if rank == 1 else Ladder())
    assert (type(caught.value) is TypeError) == (rank == 1), caught.value
    if make_name == "wrap":
        with pytest.raises((TypeError, fastddp.MismatchError), match="'bucket_cap_mib'"):
            make(Ladder(), **({"bucket_cap_mib": 1} if rank == 1 else {}))
        with pytest.raises((RuntimeError, fastddp.MismatchError), match="quantum"):
            make(Ladder(), **({"device": "quantum"} if rank == 1 else {}))
    ours = make(Ladder())
    ours(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(ours.module, mean_x(0, world_size), "after all that")


@pytest.mark.parametrize("make_name", MAKES)
def test_one_rank_with_a_bad_option_stops_all(make_name: str) -> None:
    run_ranks(_one_rank_has_a_bad_option, 2, make_name, timeout=20)


def _engine_from_environment(rank: int, world_size: int) -> list[str]:
    names = []
    for engine in (None, "python"):
        ours = fastddp.DistributedDataParallel(Ladder(), engine=engine)
        names.append(type(ours._replica._reducer).__name__)
    return names


def test_the_engine_is_the_keyword_or_the_environment(engine: str) -> None:
    (names,) = set(
        map(tuple, run_ranks(_engine_from_environment, 2, env={"FASTDDP_ENGINE": engine}))
    )
    assert names == (
        {"native": "NativeReducer", "python": "PythonReducer"}[engine],
        "PythonReducer",
    )


# --- bad input, in one process --------------------------------------------------------------------


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

"""What both classes say of themselves, they say alike."""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any

import pytest
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
    """All that torch's class keeps, but for what is its reducer's own."""
    of_its_reducer = ("_join_config", "reducer", "logger", "_static_graph_delay_allreduce_enqueued")
    mesh = torch.distributed.init_device_mesh("cpu", (world_size,))

    def model() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        model._ddp_params_and_buffers_to_ignore = ["0.bias"]
        return model

    for options in (
        {},
        {"device_mesh": mesh},
        {"bucket_cap_mb": 3},
        {"bucket_cap_mb_list": [1, 2], "forward_sync_buffers": False},
        {"static_graph": True, "gradient_as_bucket_view": True},
    ):
        ours = fastddp.DistributedDataParallel(model(), engine=engine, **options)
        theirs = nn.parallel.DistributedDataParallel(model(), **options)
        for name in vars(theirs):
            if name in of_its_reducer or name in vars(nn.Module()):
                continue
            got, want = getattr(ours, name), getattr(theirs, name)
            if name in ("_module_parameters", "modules_buffers"):
                got, want = len(got), len(want)
            elif name == "named_module_buffers":
                got, want = list(got), list(want)
            elif name == "bucket_bytes_cap":
                got, want = max(got, 2**20), max(want, 2**20)  # see fastddp.ddp.torch_attributes
            assert got == want, (name, got, want, options)
        for name in ("broadcast_buffers", "_distributed_rank", "join_process_group"):
            assert getattr(ours, name) == getattr(theirs, name), name
        for name in ("will_sync_module_buffers", "_check_sync_bufs_pre_fwd"):
            assert getattr(ours, name)() == getattr(theirs, name)(), name
        for name in ("buffer_hook", "_authoritative_rank", "_options", "no_such_name"):
            assert not hasattr(ours, name), name
            assert not hasattr(theirs, name), name
        assert not ours._lazy_init_ran
        ours(torch.ones(2, 2))
        assert ours._lazy_init_ran
        wrapped = fastddp.wrap(model(), engine=engine, **options)
        assert len(wrapped._module_parameters) == len(theirs._module_parameters)
        assert wrapped._bucket_config == theirs._bucket_config
    methods = [name for name in dir(theirs.logger) if not name.startswith("__")]
    missing = {name for name in methods if not hasattr(ours.logger, name)}
    assert missing == {"_pybind11_conduit_v1_", "set_construction_data_and_log"}


def test_attributes_are_those_of_torch(engine: str) -> None:
    run_ranks(attributes_of_both, 2, engine)


def assert_times(data: dict[str, Any]) -> None:
    """One after the other, and the differences of each other."""
    forward, begin, end = (
        data[f"{name}"]
        for name in (
            "forward_compute_time_start",
            "backward_compute_time_start",
            "backward_compute_time_end",
        )
    )
    launched, reduced = data["backward_comm_time_start"], data["backward_comm_time_end"]
    assert 0 < time.time_ns() - forward < 60e9
    assert forward < begin < end <= reduced
    assert begin <= launched < reduced
    assert data["forward_compute_time"] == begin - forward
    assert data["backward_compute_time"] == end - begin
    assert data["backward_comm_time"] == reduced - launched
    overlap = data["backward_compute_comm_overlap_time"]
    assert abs(overlap - max(0, end - launched)) <= 2000, "but for what is rounded"
    for name in ("forward_compute", "backward_compute", "backward_comm"):
        assert data[f"avg_{name}_time"] > 0


def sampling_of_both(rank: int, world_size: int, engine: str) -> None:
    """Times are those of the first ten iterations and of every third one then, as with torch."""
    of_maker = []
    for make in (
        nn.parallel.DistributedDataParallel,
        functools.partial(fastddp.DistributedDataParallel, engine=engine),
    ):
        model = make(nn.Linear(2, 2))
        model._set_ddp_runtime_logging_sample_rate(3)
        seen = []
        for _ in range(17):
            model(torch.ones(1, 2)).sum().backward()
            with torch.no_grad():
                model(torch.ones(1, 2))
            with model.no_sync():
                model(torch.ones(1, 2)).sum().backward()
            seen.append(model._get_ddp_logging_data()["iteration"])
        of_maker.append(seen)
    assert of_maker[1] == of_maker[0] == [*range(11), 10, 12, 12, 12, 15, 15]


def test_times_are_sampled_as_torch_does(engine: str) -> None:
    run_ranks(sampling_of_both, 2, engine)


class Dynamic(nn.Module):
    """Uses a layer, or all but it; one with sparse gradients is first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2, sparse=True)
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)

    def forward(self, uses: str) -> torch.Tensor:
        x = self.embed(torch.tensor([0]))
        for name in uses.split():
            x = getattr(self, name)(x)
        return x


def usage_of_both(rank: int, world_size: int, transport: str, engine: str) -> None:
    programs = {
        "alike": ["first"] * 4,
        "by rank": [("first second", "first")[rank]] * 4,
        "by step": ["first", "second", "first second", ""],
        "by rank in the end": ["first", "first", "first", ("first", "second")[rank]],
    }
    for what, program in programs.items():
        theirs = nn.parallel.DistributedDataParallel(Dynamic(), find_unused_parameters=True)
        ours = fastddp.DistributedDataParallel(Dynamic(), engine=engine)
        wrapped = fastddp.wrap(Dynamic(), engine=engine)
        for step, uses in enumerate(program):
            for model in (theirs, ours, wrapped):
                model(uses).sum().backward()
            want = theirs.reducer._get_local_used_map()
            for model in (ours, wrapped):
                got = model.reducer._get_local_used_map()
                assert got.dtype == want.dtype
                assert got.tolist() == want.tolist(), (what, step)
                data = model._get_ddp_logging_data()
                unused = 16 * sum(name not in uses for name in ("first", "second"))
                assert data["unused_parameter_size"] == unused, (what, step)
        # Torch looks from the second iteration on.
        is_static = len(set(program)) == 1
        assert ours.reducer._ddp_graph_static() is is_static, what
        assert wrapped.stats().is_static is is_static, what


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_which_parameters_were_used_where(transport: str, engine: str) -> None:
    env = {"FASTDDP_SHM": "1" if transport == "shm" else "0"}
    run_ranks(usage_of_both, 2, transport, engine, env=env)


def arrivals_of_both(rank: int, world_size: int, engine: str) -> None:
    def model() -> nn.Module:
        return nn.Sequential(*(nn.Linear(60, 60, bias=False) for _ in range(4)))

    for make in (
        nn.parallel.DistributedDataParallel,
        functools.partial(fastddp.DistributedDataParallel, engine=engine),
        functools.partial(fastddp.wrap, engine=engine),
    ):
        ours = make(model())
        assert ours.reducer.get_backward_stats() == [0] * 4
        for _ in range(2):
            ours(torch.ones(2, 60)).sum().backward()
            times = ours.reducer.get_backward_stats()
            assert times == sorted(times, reverse=True), "from the last layer to the first"
            assert 0 < min(times) < max(times) < 60e9


def test_when_gradients_arrive(engine: str) -> None:
    run_ranks(arrivals_of_both, 2, engine)


def entries_after_training(rank: int, world_size: int, engine: str) -> None:
    """The same plan on both sides, from the same order of arrival."""

    def train(model: nn.Module) -> nn.Module:
        for _ in range(4):
            model(torch.ones(4, 300)).sum().backward()
        return model

    made = []
    for make in (
        nn.parallel.DistributedDataParallel,
        functools.partial(fastddp.DistributedDataParallel, engine=engine),
        functools.partial(fastddp.wrap, engine=engine),
    ):
        torch.manual_seed(0)
        made.append(train(make(nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 900)))))
    want = made[0]._get_ddp_logging_data()
    for model in made[1:]:
        got = model._get_ddp_logging_data()
        for name, value in want.items():
            # Torch's first plan is one of other buckets.
            if "time" not in name and name != "bucket_sizes":
                assert got[name] == value, (name, got[name], value)
        assert {name for name in want if "time" in name} <= set(got)
        assert_times(got)
        of_logger = model.logger._get_ddp_logging_data()
        assert {**of_logger.strs_map, **of_logger.ints_map} == got
        assert all(type(value) is int for value in of_logger.ints_map.values())


def test_logging_data_after_training_is_that_of_torch(engine: str) -> None:
    run_ranks(entries_after_training, 2, engine)


def errors_in_backward(rank: int, world_size: int, engine: str) -> None:
    model = fastddp.DistributedDataParallel(nn.Linear(2, 2), engine=engine)

    def error() -> tuple[int, str]:
        data = model._get_ddp_logging_data()
        return data.get("has_error", 0), data.get("error", "")

    x = torch.ones(1, 2)
    model(x).sum().backward()
    x.requires_grad_().register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    assert error() == (0, ""), "the script's own"
    # Of the end of a round: what is there cannot be averaged. The other rank does not notice.
    if rank == 1:
        model.module.bias.grad = torch.zeros(2)
        model.module.bias.grad.resize_(3)
    loss = model(torch.ones(1, 2)).sum()
    if rank == 1:
        loss = (0 * model.module.weight).sum() + 0 * loss.detach()
        with pytest.raises(RuntimeError, match="parameter 'bias' has shape"):
            loss.backward()
    else:
        loss.backward()
    assert error()[0] == rank
    assert ("parameter 'bias' has shape" in error()[1]) == (rank == 1)
    # At a gradient, and in finalizing; it stays when the parameters are hooked anew.
    model.zero_grad()
    model.require_manual_backward_finalization = True
    loss = model(torch.ones(1, 2)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="in flight"):
        loss.backward()
    assert "rank" in error()[1]
    assert "in flight" in error()[1]
    model.finalize_backward()
    with pytest.raises(RuntimeError, match="finalize_backward"):
        model.finalize_backward()
    assert "no gradients are in flight" in error()[1]
    model.double()
    assert "no gradients are in flight" in error()[1]


def test_errors_in_backward_are_in_the_logging_data(engine: str) -> None:
    run_ranks(errors_in_backward, 2, engine)


def errors_of_both(rank: int, world_size: int, engine: str) -> None:
    for make in (
        nn.parallel.DistributedDataParallel,
        functools.partial(fastddp.DistributedDataParallel, engine=engine),
        functools.partial(fastddp.wrap, engine=engine),
    ):
        model = make(nn.Linear(2, 2))
        assert "has_error" not in model._get_ddp_logging_data()
        with pytest.raises(TypeError, match="must be callable"):
            model.register_comm_hook(None, 1)
        data = model._get_ddp_logging_data()
        assert data["has_error"] == 1
        assert "must be callable" in data["error"]
        with pytest.raises(ValueError, match="equal or greater than 1"):
            model._set_ddp_runtime_logging_sample_rate(0)
        assert "equal or greater than 1" in model._get_ddp_logging_data()["error"]
        model.logger.set_error_and_log("a caller's own")
        assert model._get_ddp_logging_data()["error"] == "a caller's own"

        with model.join():
            for _ in range(rank + 1):
                model(torch.ones(1, 2)).sum().backward()
        assert model._get_ddp_logging_data()["join_uneven_inputs"] == 1
        assert model._authoritative_rank == world_size - 1


def test_errors_and_joins_are_in_the_logging_data(engine: str) -> None:
    run_ranks(errors_of_both, 2, engine)


def warnings_of_both(rank: int, world_size: int) -> None:
    by_maker = []
    for make in (
        nn.parallel.DistributedDataParallel,
        fastddp.DistributedDataParallel,
        fastddp.wrap,
    ):
        given = []
        for options in (
            {},
            {"forward_sync_buffers": False},
            {"broadcast_buffers": True},
            {"broadcast_buffers": False},
            {"broadcast_buffers": False, "forward_sync_buffers": True},
            {"check_reduction": True},
        ):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = make(nn.Linear(2, 2), **options)
            named = [name for name in options if any(name in str(w.message) for w in caught)]
            given.append((len(caught), [w.category for w in caught], named))
            assert all(w.filename == __file__ for w in caught), "where the caller stands"
            assert model.forward_sync_buffers == options.get(
                "forward_sync_buffers", options.get("broadcast_buffers", True)
            )
        by_maker.append(given)
    assert by_maker[0][0] == (0, [], [])
    assert by_maker[1] == by_maker[0]
    assert by_maker[2] == by_maker[0]


def test_deprecated_arguments_warn_where_those_of_torch_do() -> None:
    run_ranks(warnings_of_both, 2)

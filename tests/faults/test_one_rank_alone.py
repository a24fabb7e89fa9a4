"""What one rank may do alone talks to nobody, and what it may not says who is missing.

A rank alone would wait for the group's timeout, which is short here, and fail.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastddp
from fastddp.comm.waiting import waiting
from tests.ranks import init_group, run_ranks, scratch_folder

TIMEOUT_S = 4.0
TRANSPORTS = {"shm": None, "gloo": "0"}
MAKES = ("wrap", "DistributedDataParallel")


class Counter(nn.Module):
    """The gradient of its weight is x; its buffer adds up what it has seen in training."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: float) -> Tensor:
        if self.training:
            self.seen += x
        return self.weight.sum() * x


@contextmanager
def only_rank_0(rank: int) -> Iterator[None]:
    """Has the other ranks sleep until rank 0 has left the block, without a collective."""
    done = scratch_folder() / "done"
    if rank != 0:
        while not done.exists():
            time.sleep(0.01)
    yield
    if rank == 0:
        done.touch()


def assert_trains(model: Any, rank: int, seen: float, what: str) -> None:
    """Take a step on all ranks, and check gradients, and buffers, which come from rank 0's."""
    inner = model.module
    inner.weight.grad = None
    model.train()
    model(2.0 * rank).backward()
    assert inner.weight.grad.tolist() == [1.0] * 3, what
    assert inner.seen.tolist() == [seen + 2.0 * rank] * 2, what


def enter(block: AbstractContextManager[object]) -> None:
    with block:
        pass


def questions(model: Any, rank: int) -> dict[str, Callable[[], object]]:
    """Everything that a wrapped model can be asked for or told by one rank alone."""
    weights = {name: torch.full_like(t, 5.0) for name, t in model.state_dict().items()}
    return {
        "repr": lambda: repr(model),
        "str of the module": lambda: str(model.module),
        "dir": lambda: dir(model),
        "state_dict": lambda: model.state_dict(),
        "load_state_dict": lambda: model.load_state_dict(weights),
        "torch.save": lambda: torch.save(model.state_dict(), io.BytesIO()),
        "parameters": lambda: [*model.parameters(), *model.named_buffers()],
        "modes": lambda: (model.eval(), model.train()),
        "zero_grad": lambda: (model.zero_grad(), model.zero_grad(set_to_none=False)),
        "apply": lambda: model.apply(lambda _: None),
        "conversions that change nothing": lambda: (model.float(), model.cpu(), model.to("cpu")),
        "stats": lambda: (model.stats(), model.plan()),
        "logging data": lambda: model._get_ddp_logging_data(),
        "attributes": lambda: (
            model.device,
            model.process_group,
            model.require_forward_param_sync,
            model.require_backward_grad_sync,
            model.modules_buffers,
            model.reducer,
        ),
        "no_sync": lambda: enter(model.no_sync()),
        "accumulate": lambda: enter(fastddp.accumulate(model, 1)),
        "join_hook": lambda: model.join_hook(),
        "autograd.grad": lambda: torch.autograd.grad(model.module(1.0), [model.module.weight]),
        "graph": lambda: model._set_static_graph(),
    }


def copies(model: Any) -> dict[str, Callable[[], Any]]:
    return {
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "copy of a copy": lambda: copy.deepcopy(copy.deepcopy(model)),
    }


def _alone(rank: int, world_size: int, make_name: str, engine: str) -> None:
    init_group(timeout_s=TIMEOUT_S)
    inner = Counter()
    model = getattr(fastddp, make_name)(inner, engine=engine)
    made: dict[str, Any] = {}
    with only_rank_0(rank):
        if rank == 0:
            with torch.no_grad():
                assert model(3.0).item() == 9.0  # the first forward ever
            with torch.inference_mode():
                model.eval()(3.0)
            for ask in questions(model, rank).values():
                ask()
            assert inner.weight.tolist() == [5.0] * 3
            with torch.no_grad():
                inner.weight.fill_(1.0)
                inner.seen.fill_(7.0)
        made = {name: make() for name, make in copies(model).items()}
        for made_copy in made.values():
            made_copy.eval()
            with torch.no_grad():
                assert made_copy(2.0).item() == 6.0
            assert repr(made_copy) == repr(model.eval())
    assert_trains(model, rank, 7.0, "after questions")
    with only_rank_0_again(rank), torch.no_grad():
        if rank == 0:
            model.train()(1.0)
            model.eval()(1.0)
    assert_trains(model, rank, 8.0, "after an evaluation in training mode")
    for name, made_copy in made.items():
        assert_trains(made_copy, rank, 7.0, name)
        assert_trains(made_copy, rank, 7.0, f"{name}, again")


@contextmanager
def only_rank_0_again(rank: int) -> Iterator[None]:
    (scratch_folder() / "done").unlink(missing_ok=True)
    dist.barrier()
    with only_rank_0(rank):
        yield


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("make_name", MAKES)
def test_what_one_rank_does_alone_talks_to_nobody(
    make_name: str, transport: str, engine: str
) -> None:
    env = {"FASTDDP_SHM": TRANSPORTS[transport]}
    run_ranks(_alone, 2, make_name, engine, env=env, init_group=False)


def _pickled(rank: int, world_size: int, make_name: str, engine: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(getattr(fastddp, make_name)(Counter(), engine=engine), buffer)
    return buffer.getvalue()


def _loads_in_a_fresh_job(rank: int, world_size: int, data: bytes, transport: str) -> None:
    """No model was wrapped here: the ranks have yet to meet in shared memory."""
    init_group(timeout_s=TIMEOUT_S)
    with only_rank_0(rank):
        model = torch.load(io.BytesIO(data), weights_only=False)
        other = copy.deepcopy(model)
        with torch.no_grad():
            assert model(2.0).item() == 6.0
        model.module.seen.zero_()
        repr(model)
        model.double().float()
        model.module.weight.grad = None
    for step in range(2):
        assert_trains(model, rank, 0.0, f"step {step}")
    backend = model._replica.attachment.transport()._get_backend(torch.device("cpu")).name()
    assert backend == transport, "they have met"
    assert_trains(other, rank, 0.0, "a copy from before they met")
    backend = other._replica.attachment.transport()._get_backend(torch.device("cpu")).name()
    assert backend == transport, "with the copy, too"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("make_name", MAKES)
def test_a_rank_loads_a_model_alone_in_a_fresh_job(
    make_name: str, transport: str, engine: str
) -> None:
    data = run_ranks(_pickled, 2, make_name, engine)[0]
    env = {"FASTDDP_SHM": TRANSPORTS[transport]}
    run_ranks(_loads_in_a_fresh_job, 2, data, transport, env=env, init_group=False)


# --- what is collective ---------------------------------------------------------------------------


def _wrap(model: Any, group: dist.ProcessGroup) -> None:
    fastddp.wrap(Counter(), process_group=group)


def _forward(model: Any, group: dist.ProcessGroup) -> None:
    model(1.0)


def _gather(model: Any, group: dist.ProcessGroup) -> None:
    fastddp.gather_unpadded(torch.ones(2), group=group)


COLLECTIVE: dict[Callable[..., None], str] = {
    _wrap: "wrapping a model: the comparison of the ranks' models",
    _forward: "the broadcast of 1 buffers ('seen' ...) before forward",
    _gather: "fastddp.gather_unpadded: the comparison of the ranks' tensors",
}


SOON = {"FASTDDP_STALL": "warn", "FASTDDP_STALL_SECONDS": "1"}


def _left_alone(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    """Ranks 0 and 2 call, rank 1 does not; returns the errors and what was logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastddp").addHandler(handler)
    timeout = timedelta(seconds=2.5)
    groups = [dist.new_group(timeout=timeout) for _ in COLLECTIVE]
    models = [fastddp.wrap(Counter(), process_group=group) for group in groups]
    errors = []
    if rank != 1:
        for call, model, group in zip(COLLECTIVE, models, groups, strict=True):
            with pytest.raises(dist.DistBackendError) as caught:
                call(model, group)
            errors.append(str(caught.value))
    dist.barrier()
    return errors, lines


def test_a_rank_that_is_alone_in_a_call_names_it_and_who_is_missing() -> None:
    by_rank = run_ranks(_left_alone, 3, env=SOON)
    assert by_rank[1][0] == []
    assert by_rank[2][1] == [], "one rank tells for all"
    barrier = r"the script's own barrier on group '0'"
    for rank in (0, 2):
        for call, error in zip(COLLECTIVE.values(), by_rank[rank][0], strict=True):
            begin = rf"fastddp: rank {rank}: {re.escape(call)} failed"
            assert re.match(rf"{begin} \(rank 1 waits in {barrier}\): .", error), error
    told = "\n".join(by_rank[0][1])
    for call in COLLECTIVE.values():
        where = r"( on group '\d+')?(, step 1)?, at .*\n"
        begin = rf"fastddp: rank 0 has waited for 1\.\d s in {re.escape(call)}{where}"
        assert re.search(
            rf"{begin}  waiting too: rank 2\n  rank 1 has not come: it waits in {barrier}", told
        ), told


def _fail_in(wait: waiting) -> None:
    with wait:
        time.sleep(2.0)
        raise RuntimeError("too late")


def _in_different_calls(rank: int, world_size: int, across_hosts: bool) -> str:
    if across_hosts:
        os.environ["FASTDDP_HOST_ID"] = str(rank)
    group = dist.new_group(timeout=timedelta(seconds=5))
    first, second = (waiting(group, call) for call in ("the first", "the second"))
    with pytest.raises(dist.DistBackendError) as caught:
        _fail_in(first if rank == 0 else second)
    with waiting(group, "the third"):  # what failed is no longer in the way
        time.sleep(0.5)
    if across_hosts:
        store, key = group.get_group_store(), f"fastddp waits/{rank}"
        deadline = time.monotonic() + 20
        while store.get(key) != b"" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert store.get(key) == b"", "the note of a wait that is over is taken back"
    return str(caught.value)


@pytest.mark.parametrize("across_hosts", [False, True])
def test_ranks_in_different_calls_are_told_both(across_hosts: bool) -> None:
    assert run_ranks(_in_different_calls, 2, across_hosts, env=SOON) == [
        "fastddp: rank 0: the first failed (rank 1 waits in the second on group '1'): too late",
        "fastddp: rank 1: the second failed (rank 0 waits in the first on group '1'): too late",
    ]

"""Ways of training a model on the stand-in device.

Each program trains one model, on the device, in the way that it is about; the group takes the other
ranks to hold what this one holds, so that averaged gradients are those of the same model on the
CPU, which trains beside it.
"""

from __future__ import annotations

import copy
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel.distributed import _MixedPrecision as MixedPrecision
from torch.utils.checkpoint import checkpoint

import fastddp
from tests.streams import device
from tests.streams.group import RecordingGroup

Program = Callable[[str], "Trained"]

ROUNDS = 4
SETTLED = 2
"""The rounds before it agree on the order of buckets, for which the host waits: once for the order
to be sent and once for it to be known."""


class Trained:
    """A model in training, and the same one on the CPU beside it."""

    def __init__(
        self,
        engine: str,
        model: nn.Module,
        *,
        on_cpu: nn.Module | None = None,
        group: RecordingGroup | None = None,
        **options: Any,
    ) -> None:
        self.group = group or RecordingGroup(size=4)
        self.on_cpu = on_cpu or copy.deepcopy(model)
        options.setdefault("bucket_cap_mb", 0.0005)
        self.model = fastddp.DistributedDataParallel(
            model.to(device.NAME), process_group=self.group, engine=engine, **options
        )
        self.optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (self.model, self.on_cpu)]
        self.waits: list[list[str]] = []
        """Of the host, by backward."""
        self._seen: list[list[tuple[Tensor | None, ...]]] = [[], []]
        """Gradients, by step, of both."""
        self._batches = batches()

    def backward(self, stream: torch.Stream | None = None) -> None:
        """Runs a forward and a backward on both; on the device, backward from ``stream``."""
        x = next(self._batches)
        loss = self.model(x.to(device.NAME, non_blocking=True)).square().mean()
        device.host_syncs()
        current = torch.accelerator.current_stream()
        stream = stream or current
        stream.wait_stream(current)
        loss.record_stream(stream)
        try:
            with stream:
                loss.backward()
        finally:
            current.wait_stream(stream)
            self.waits.append([f"{w.what}: {w.where}" for w in device.host_syncs()])
        self.on_cpu(x).square().mean().backward()

    def step(self) -> None:
        """Lets the optimizers step. Nothing waits: what is to be compared is kept until the end."""
        for optimizer, seen in zip(self.optimizers, self._seen, strict=True):
            params = optimizer.param_groups[0]["params"]
            seen.append(tuple(None if p.grad is None else p.grad.clone() for p in params))
            optimizer.step()
            optimizer.zero_grad()

    def rounds(self, stream: torch.Stream | None = None) -> None:
        """Trains, with a backward for each step."""
        for _ in range(ROUNDS):
            self.backward(stream)
            self.step()

    def compare(self) -> None:
        """Checks that every step had the gradients that it had on the CPU."""
        reduced = {e.dtype for e in self.group.log if e.op == "allreduce"}
        close = {"rtol": 0.02, "atol": 0.002} if torch.bfloat16 in reduced else {}
        for mine, others in zip(*self._seen, strict=True):
            for grad, other in zip(mine, others, strict=True):
                assert (grad is None) == (other is None)
                if grad is not None and other is not None:
                    torch.testing.assert_close(grad.cpu(), other, **close)

    def num_buckets(self) -> int:
        return len(self.model._replica.plan().buckets)


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(7)
    while True:
        yield torch.randn(6, 8, generator=generator)


class Layers(nn.Module):
    """Registered in another order than they are used in, so that round 2 has another plan."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.first = nn.Linear(8, 16)
        self.middle = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.narrow = nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for layer in self.middle:
            x = torch.tanh(layer(x))
        return self.last(self.narrow(self.norm(x)))


# ---- programs ------------------------------------------------------------------------------------


def several_rounds(engine: str) -> Trained:
    trained = Trained(engine, Layers())
    before = trained.model._replica.plan()
    trained.rounds()
    assert trained.num_buckets() > 3
    assert trained.model._replica.plan() != before
    return trained


def finalized_by_hand(engine: str) -> Trained:
    trained = Trained(engine, Layers())
    trained.model.require_manual_backward_finalization = True
    for _ in range(ROUNDS):
        trained.backward()
        trained.model.finalize_backward()
        trained.step()
    return trained


class Below(nn.Module):
    """Its input is computed from, so that a hook can finalize when all that is above is done."""

    finalize: Callable[[], None]

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: Tensor) -> Tensor:
        x = 1 * x.requires_grad_()
        if x.device.type != "cpu":
            x.register_hook(lambda _: self.finalize())
        return self.layers(x)


def finalized_inside_backward(engine: str) -> Trained:
    """On autograd's stream, that of forward; the gradients are used on the caller's."""
    trained = Trained(engine, Below())
    trained.model.module.finalize = trained.model.finalize_backward
    trained.model.require_manual_backward_finalization = True
    trained.rounds(device.stream("side"))
    return trained


def lazy_buckets(engine: str) -> Trained:
    trained = Trained(engine, Layers(), lazy_bucket_allocation=True)
    trained.rounds()
    return trained


def lazy_buckets_of_branches(engine: str) -> Trained:
    """The stream that allocates a bucket is another one than others that fill it."""
    caps = [1e-4, 25]  # the last layer alone, whose stream all others are behind
    return wrapped_after_a_forward(
        engine, bucket_cap_mb=None, bucket_cap_mb_list=caps, lazy_bucket_allocation=True
    )


def one_bucket(engine: str) -> Trained:
    trained = Trained(engine, Layers(), bucket_cap_mb=25)
    trained.rounds()
    assert trained.num_buckets() == 1
    return trained


def micro_batches(engine: str) -> Trained:
    trained = Trained(engine, Layers())
    for _ in range(ROUNDS):
        with trained.model.no_sync():
            trained.backward()
            trained.backward()
        trained.backward()
        trained.step()
    trained.waits = trained.waits[2::3]
    return trained


def gradients_kept(engine: str) -> Trained:
    """`zero_grad(set_to_none=False)`: the optimizer writes to the buckets."""
    trained = Trained(engine, Layers())
    for _ in range(ROUNDS):
        trained.backward()
        for optimizer in trained.optimizers:
            optimizer.zero_grad(set_to_none=False)
        with trained.model.no_sync():
            trained.backward()
        trained.backward()
        trained.step()
    trained.waits = trained.waits[2::3]
    return trained


def a_parameter_used_twice(engine: str) -> Trained:
    model = Layers()
    model.middle.append(model.middle[0])
    trained = Trained(engine, model)
    trained.rounds()
    return trained


def strided_parameters(engine: str) -> Trained:
    model = Layers()
    for layer in model.middle:
        layer.weight = nn.Parameter(layer.weight.detach().t())
    trained = Trained(engine, model)
    assert not trained.model.module.middle[0].weight.is_contiguous()
    trained.rounds()
    return trained


def buffers(engine: str) -> Trained:
    model = Layers()
    model.norm = nn.BatchNorm1d(16)
    trained = Trained(engine, model)
    trained.rounds()
    assert [entry.op for entry in trained.group.log].count("broadcast") > ROUNDS
    return trained


def strided_buffers(engine: str) -> Trained:
    """They go through copies; on another stream than the one that these belong to."""
    model = Layers()
    model.norm = nn.BatchNorm1d(16)
    model.norm.running_mean = torch.zeros(32)[::2]
    model.norm.running_var = torch.ones(2, 16)[1:].expand(2, 16)[0]
    trained = Trained(engine, model)
    trained.backward()
    trained.step()
    # `.to()` has made them dense: what a model assigns later is not.
    norm = trained.model.module.norm
    norm.running_mean = torch.stack([norm.running_mean] * 2, dim=1)[:, 0]
    side = device.stream("side")
    trained.backward()
    trained.step()
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        x = torch.ones(6, 8, device=device.NAME)
        trained.model(x)
        former = norm.running_mean
        norm.running_mean = former.clone()  # its copy is dropped while in use
        trained.model(x)
        trained.rounds()
    torch.accelerator.current_stream().wait_stream(side)
    del former
    return trained


class Checkpointed(Layers):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for layer in self.middle:
            x = checkpoint(
                nn.Sequential(layer, nn.Tanh()),
                x,
                use_reentrant=self.use_reentrant,
                preserve_rng_state=False,
            )
        return self.last(self.narrow(self.norm(x)))


def checkpoints(engine: str) -> Trained:
    trained = Trained(engine, Checkpointed(use_reentrant=False))
    trained.rounds()
    return trained


def reentrant_checkpoints(engine: str) -> Trained:
    trained = Trained(engine, Checkpointed(use_reentrant=True))
    trained.rounds()
    return trained


def half_the_bytes(engine: str) -> Trained:
    """Reduces in bfloat16."""
    trained = Trained(engine, Layers(), mixed_precision=MixedPrecision(reduce_dtype=torch.bfloat16))
    trained.rounds()
    assert {e.dtype for e in trained.group.log if e.numel > 200} >= {torch.bfloat16}
    return trained


def hook_of_torch(engine: str) -> Trained:
    trained = Trained(engine, Layers())
    trained.model.register_comm_hook(trained.group, default_hooks.bf16_compress_hook)
    trained.rounds()
    return trained


def delayed_parameters(engine: str) -> Trained:
    """Some gradients are averaged after the others, all at once."""
    on_cpu = Layers()
    model = copy.deepcopy(on_cpu).to(device.NAME)
    names = ["last.weight", "middle.1.weight", "norm.bias"]
    trained = Trained(
        engine,
        model,
        on_cpu=on_cpu,
        delay_all_reduce_named_params=[(name, model.get_parameter(name)) for name in names],
        param_to_hook_all_reduce=model.first.weight,
    )
    trained.rounds()
    return trained


def unused_parameters(engine: str) -> Trained:
    """The host then reads which parameters no rank has used."""
    model = Layers()
    model.unused = nn.Linear(2, 2)
    trained = Trained(engine, model, find_unused_parameters=True)
    trained.rounds()
    assert trained.model.module.unused.weight.grad is None
    return trained


def rounds_of_the_others(engine: str) -> Trained:
    """As `join` has it: takes part with nothing to add."""
    trained = Trained(engine, Layers())
    for nth in range(ROUNDS):
        if nth % 2:
            trained.model._replica.shadow()
        trained.backward()
        trained.step()
    return trained


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(*_: Any) -> Tensor:
        raise ArithmeticError("in the midst of backward")


class Fragile(Layers):
    breaks = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.middle[0](x))
        if self.breaks:
            x = _Raises.apply(x)
        return self.last(self.narrow(self.norm(self.middle[2](self.middle[1](x)))))


def backward_raises(engine: str) -> Trained:
    """The round is abandoned: its buckets are in flight and nobody will wait for them."""
    return _some_raise(Trained(engine, Fragile()))


def backward_raises_on_another_stream(engine: str) -> Trained:
    with _side_stream():
        return _some_raise(Trained(engine, Fragile()))


def last_of_micro_batches_raises_on_another_stream(engine: str) -> Trained:
    with _side_stream():
        return _some_raise(Trained(engine, Fragile()), num_before=1)


def _side_stream() -> torch.Stream:
    side = device.stream("side")
    side.wait_stream(torch.accelerator.current_stream())
    return side


def _some_raise(trained: Trained, num_before: int = 0) -> Trained:
    for nth in range(2 * ROUNDS):
        trained.model.module.breaks = False
        for _ in range(num_before):
            with trained.model.no_sync():
                trained.backward()
        trained.model.module.breaks = nth in (0, 3, 4)
        num_collectives = len(trained.group.log)
        if trained.model.module.breaks:
            with pytest.raises(ArithmeticError):
                trained.backward()
            # The last to let go of the backward, often autograd's own thread, abandons the round.
            deadline = time.monotonic() + 10
            while len(trained.group.log) < num_collectives + trained.num_buckets():
                assert time.monotonic() < deadline, "the abandoned round's buckets were not sent"
                time.sleep(0.001)
            for optimizer in trained.optimizers:
                optimizer.zero_grad()
        else:
            trained.backward()
            trained.step()
    return trained


class Branches(nn.Module):
    """Two layers run on streams of their own, as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.middle = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.last = nn.Linear(16, 3)
        self.streams: list[torch.Stream | None] = [None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if x.device.type == "cpu":
            return self.last(sum(layer(x) for layer in self.middle))
        current = torch.accelerator.current_stream()
        results = []
        for layer, stream in zip(self.middle, self.streams, strict=True):
            stream = stream or current
            stream.wait_stream(current)
            with stream:
                results.append(layer(x))
            x.record_stream(stream)
            results[-1].record_stream(current)
        for stream in self.streams:
            if stream is not None:
                current.wait_stream(stream)
        return self.last(sum(results))


def branches_on_streams(engine: str) -> Trained:
    trained = Trained(engine, Branches(), bucket_cap_mb=25)
    streams: list[torch.Stream | None] = [device.stream("left"), device.stream("right"), None]
    for _ in range(ROUNDS):
        trained.model.module.streams = streams
        streams = streams[1:] + streams[:1]
        trained.backward()
        trained.step()
    return trained


def wrapped_after_a_forward(engine: str, **options: Any) -> Trained:
    """Autograd's nodes for the parameters then exist, and belong to the streams of that forward."""
    model = Branches().to(device.NAME)
    streams = [device.stream("left"), device.stream("right"), None]
    model.streams = streams
    output = model(next(batches()).to(device.NAME))
    model.streams = [None, None, None]  # they cannot be copied
    on_cpu = copy.deepcopy(model).cpu()
    options.setdefault("bucket_cap_mb", 25)
    trained = Trained(engine, model, on_cpu=on_cpu, **options)
    model.streams = streams
    trained.rounds()
    del output
    return trained


def trained_on_another_stream(engine: str) -> Trained:
    trained = Trained(engine, Layers())
    side = device.stream("side")
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        trained.rounds()
    return trained


def wrapped_on_another_stream(engine: str) -> Trained:
    """As before the capture of a graph: then no gradient has to change streams."""
    side = device.stream("side")
    side.wait_stream(torch.accelerator.current_stream())
    with side, warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of gradients that do
        trained = Trained(engine, Layers())
        trained.rounds()
    return trained


def backward_from_another_stream(engine: str) -> Trained:
    return _backward_from_another_stream(Trained(engine, Layers()))


def half_the_bytes_from_another_stream(engine: str) -> Trained:
    mixed = MixedPrecision(reduce_dtype=torch.bfloat16)
    return _backward_from_another_stream(Trained(engine, Layers(), mixed_precision=mixed))


def comm_dtype(engine: str) -> Trained:
    trained = Trained(engine, Layers(), comm_dtype=torch.bfloat16)
    trained.rounds()
    reduced = {e.dtype for e in trained.group.log if e.op == "allreduce"}
    assert reduced == {torch.bfloat16}
    return trained


def comm_dtype_from_another_stream(engine: str) -> Trained:
    trained = Trained(engine, Layers(), comm_dtype=torch.bfloat16)
    return _backward_from_another_stream(trained)


def hook_of_torch_from_another_stream(engine: str) -> Trained:
    trained = Trained(engine, Layers())
    trained.model.register_comm_hook(trained.group, default_hooks.bf16_compress_hook)
    return _backward_from_another_stream(trained)


def _backward_from_another_stream(trained: Trained) -> Trained:
    side = device.stream("side")
    trained.rounds(side)
    return trained


QUIET = (
    several_rounds,
    finalized_by_hand,
    finalized_inside_backward,
    lazy_buckets,
    lazy_buckets_of_branches,
    one_bucket,
    micro_batches,
    gradients_kept,
    a_parameter_used_twice,
    strided_parameters,
    buffers,
    checkpoints,
    reentrant_checkpoints,
    half_the_bytes,
    hook_of_torch,
    delayed_parameters,
    branches_on_streams,
    wrapped_after_a_forward,
    trained_on_another_stream,
    wrapped_on_another_stream,
    backward_from_another_stream,
    half_the_bytes_from_another_stream,
    comm_dtype,
    comm_dtype_from_another_stream,
    hook_of_torch_from_another_stream,
)
"""Programs in which the host may not wait once the order of buckets is settled."""
PROGRAMS = (
    *QUIET,
    unused_parameters,
    rounds_of_the_others,
    strided_buffers,
    backward_raises,
    backward_raises_on_another_stream,
    last_of_micro_batches_raises_on_another_stream,
)


# ---- running them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Of one program."""

    error: str
    findings: list[str]
    waits: list[list[str]]


def run(program: Program, engine: str) -> Outcome:
    """Runs a program; whatever it raises becomes text."""
    try:
        trained = program(engine)
        findings = [f"{found.kind}: {found.text}" for found in device.findings()]
        torch.accelerator.synchronize()
        trained.compare()
    except Exception:
        return Outcome(traceback.format_exc(), [], [])
    waits = trained.waits
    del trained
    findings += [f"{found.kind}, at the end: {found.text}" for found in device.findings()]
    return Outcome("", findings, waits)

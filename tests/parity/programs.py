"""Training programs as plain data: a model, and what each rank does with it, step by step.

`run` executes a program on a rank and notes every `.grad` after every operation. What they should
be is in `tests/parity/oracle.py`; `tests/parity/test_properties.py` makes programs at random.

All numbers are small and whole, so that a rank's own gradients are exact in every dtype and only
averaging rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fastddp
from tests.conftest import flattening

# ---- the model -----------------------------------------------------------------------------------

SHAPES: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.ones(()),
    "empty": lambda: torch.ones(0, 3),
    "vector": lambda: torch.ones(5),
    "matrix": lambda: torch.ones(2, 3),
    "transposed": lambda: torch.ones(3, 2).t(),
    "channels_last": lambda: torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "apart": lambda: torch.ones(4, 2)[:, 0],
    "expanded": lambda: torch.ones(3, 1).expand(3, 2),
}
NOT_DENSE = ("apart", "expanded")
"""Cannot be broadcast, so they are for `init_sync=False`."""

USES = ("sum", "weighted", "twice", "part", "transposed", "conj", "conv", "add", "product", "none")
Checkpointing = Literal["no", "reentrant", "not reentrant"]


@dataclass(frozen=True)
class Param:
    shape: str
    dtype: torch.dtype
    trained: bool = True
    """Whether it requires a gradient when the model is wrapped."""


@dataclass(frozen=True)
class Term:
    """One summand of the loss: a use of one parameter, or of two."""

    use: str
    param: int
    other: int
    checkpointing: Checkpointing = "no"

    @property
    def reached(self) -> set[int]:
        """The parameters that get a gradient."""
        if self.use == "none":
            return set()
        return {self.param, self.other} if self.use in ("add", "product") else {self.param}


class Stop(Exception):
    """Raised in the midst of a backward."""


class NoGradient(torch.autograd.Function):
    """Lies on the way from the loss to a parameter and lets no gradient pass."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(*_: Any) -> None:
        return None


def _stop(_: Tensor) -> None:
    raise Stop


def weights_like(p: Tensor) -> Tensor:
    """Returns 1, 2, 3, 1, 2, ... in the shape of `p`."""
    return (torch.arange(p.numel()) % 3 + 1).reshape(p.shape).to(p.dtype)


class Model(nn.Module):
    """Its loss is `x` times a sum of terms, chosen anew in every forward."""

    def __init__(
        self, params: Sequence[Param], terms: Sequence[Term], exactly: bool = False
    ) -> None:
        super().__init__()
        self.params = params
        self.terms = terms
        for index, spec in enumerate(params):
            dtype = spec.dtype
            if exactly:
                dtype = torch.complex128 if dtype.is_complex else torch.float64
            values = SHAPES[spec.shape]().to(dtype) * (1 + index % 2)
            if spec.shape in NOT_DENSE:  # the multiplication made it dense
                values = values.new_ones(4, 2)[:, 0] if spec.shape == "apart" else values[:, :1]
                values = values.expand(3, 2) if spec.shape == "expanded" else values
            self.register_parameter(f"p{index}", nn.Parameter(values, requires_grad=spec.trained))
        self.tied = self.p0

    def param(self, index: int) -> nn.Parameter:
        return self.get_parameter(f"p{index}")

    def forward(
        self, x: Tensor, chosen: Sequence[int], stop_at: int | None = None, reentrant: bool = True
    ) -> dict[str, Any]:
        """Returns the loss, a float64 scalar, in a container.

        Args:
            x: the factor, a float64 leaf that requires a gradient.
            chosen: which terms, in this order.
            stop_at: the position of a term that raises `Stop` when its gradient arrives.
            reentrant: False uses no re-entrant checkpoints.
        """
        total = 0 * x
        for position, index in enumerate(chosen):
            term = self.terms[index]
            add = partial(self._add, x, term, position == stop_at)
            if term.checkpointing == "reentrant" and reentrant:
                total = checkpoint(add, total, use_reentrant=True, preserve_rng_state=False)
            elif term.checkpointing == "not reentrant":
                total = checkpoint(add, total, use_reentrant=False, preserve_rng_state=False)
            else:
                total = add(total)
        return {"loss": total, "more": [total.detach()]}

    def _add(self, x: Tensor, term: Term, stop: bool, total: Tensor) -> Tensor:
        value = self._value(term)
        if stop and value.requires_grad:
            value.register_hook(_stop)
        return total + x * value

    def _value(self, term: Term) -> Tensor:
        p, q = self.param(term.param), self.param(term.other)
        # The dtype of the description, which the exact model does not have.
        dtype, other_dtype = self.params[term.param].dtype, self.params[term.other].dtype
        if term.use == "add" and p.shape == q.shape and dtype == other_dtype:
            return _scalar((p + q) * weights_like(p))  # one tensor is the gradient of both
        if term.use == "add":
            return _scalar(p) + _scalar(q)
        if term.use == "product":
            return _scalar(p) * _scalar(q)
        if term.use == "conv" and p.dim() == 4 and dtype in (torch.float32, torch.float64):
            images = torch.ones(1, 3, 3, 3, dtype=p.dtype).to(memory_format=torch.channels_last)
            return _scalar(functional.conv2d(images, p))
        return _scalar(_used(term.use, p))


def _used(use: str, p: Tensor) -> Tensor:
    if use == "sum":
        return p  # the gradient is an expanded scalar
    if use == "twice":
        return p + p * weights_like(p)
    if use == "part":
        return p.flatten()[:1]
    if use == "transposed" and p.dim() > 1:
        return p.mT * weights_like(p.mT)
    if use == "conj" and p.is_complex():
        return p.conj() * weights_like(p)  # the gradient is a lazy conjugate
    if use == "none":
        return NoGradient.apply(p)
    return p * weights_like(p)


def _scalar(y: Tensor) -> Tensor:
    if y.is_complex():
        return (y.real.sum() + 2 * y.imag.sum()).double()
    return y.sum().double()


# ---- the operations ------------------------------------------------------------------------------

Forward = tuple[int, ...]
"""The terms of one forward."""


@dataclass(frozen=True)
class Backward:
    """Some forwards on every rank, then one backward over all of them (two for "twice")."""

    by_rank: tuple[tuple[Forward, ...], ...]
    sync: bool = True
    how: Literal["sum", "list", "twice", "inputs", "penalty", "direct"] = "sum"
    stop: tuple[int, int, int] | None = None
    """The rank, forward and position in it where the backward raises."""
    forward_differs: bool = False
    """Whether `no_sync` surrounds only one of forward and backward."""


REENTRANT = ("sum", "list")
"""The ways that allow re-entrant checkpoints: the others refuse them, or make a round of each."""


@dataclass(frozen=True)
class Alone:
    """What one rank may do while the others do not."""

    rank: int
    what: Literal["grad of params", "grad of x", "inputs x", "forward", "no_grad"]
    terms: Forward


@dataclass(frozen=True)
class Zero:
    set_to_none: bool


@dataclass(frozen=True)
class Freeze:
    param: int
    frozen: bool


@dataclass(frozen=True)
class Assign:
    """The user's own tensor as `.grad`, another one on each rank."""

    param: int
    odd: bool
    """Whether it holds what arithmetic does not keep: -0.0, infinities, NaN."""


Operation = Backward | Alone | Zero | Freeze | Assign


@dataclass(frozen=True)
class Program:
    params: tuple[Param, ...]
    terms: tuple[Term, ...]
    """The first is a plain use of the first parameter, which is always trained."""
    operations: tuple[Operation, ...]
    caps_bytes: tuple[int, ...] = (16,)
    init_sync: bool = True


def factor(rank: int, step: int) -> int:
    """Returns the value of `x`, another one on each rank."""
    return 1 + rank + step % 2


def assigned(p: Tensor, rank: int, odd: bool) -> Tensor:
    """Returns the value that `Assign` gives to the gradient of `p`."""
    values = weights_like(p) * (rank + 1)
    if odd and values.numel():
        odd_values = torch.tensor([-0.0, 0.1, float("nan"), float("inf"), -7.0])
        flat = odd_values.repeat(values.numel() // 5 + 1)[: values.numel()]
        values = (flat * (rank + 1)).to(p.dtype).reshape(p.shape)
    return values


# ---- on a rank -----------------------------------------------------------------------------------


@dataclass
class Step:
    """What was there after one operation."""

    grads: list[Tensor | None]
    raised: str = ""
    """The error, if it was one that the program may raise."""


@dataclass
class Trace:
    steps: list[Step] = field(default_factory=list)
    rounds: int = 0


MAY_RAISE = "got gradient number"
"""Of the error that re-entrant checkpoints may lead to, see docs/compatibility.md."""


FLATTENING = "flattening"
"""Names the native engine as it fills buckets on a GPU."""


def run(
    rank: int, world_size: int, programs: Sequence[Program], jobs: Sequence[Sequence[str]]
) -> list[list[Trace]]:
    """Runs each program as each job, which names every rank's engine; returns them in this order.

    One call runs many programs, for starting ranks takes longer than a program.
    """
    return [[_run(rank, program, job[rank]) for job in jobs] for program in programs]


def _run(rank: int, program: Program, engine: str) -> Trace:
    if engine == FLATTENING:
        with flattening():
            return _run(rank, program, "native")
    model = Model(program.params, program.terms)
    ours = fastddp.DistributedDataParallel(
        model,
        engine=engine,
        init_sync=program.init_sync,
        bucket_cap_mb_list=[cap / 2**20 for cap in program.caps_bytes],
    )
    trace = Trace()
    for step, operation in enumerate(program.operations):
        raised = _execute(ours, rank, step, operation)
        grads = [model.param(index).grad for index in range(len(program.params))]
        copies = [None if g is None else g.detach().clone().contiguous() for g in grads]
        trace.steps.append(Step(copies, raised))
    trace.rounds = ours.stats().rounds
    return trace


def _execute(
    ours: fastddp.DistributedDataParallel, rank: int, step: int, operation: Operation
) -> str:
    model = ours.module
    if isinstance(operation, Zero):
        ours.zero_grad(set_to_none=operation.set_to_none)
    elif isinstance(operation, Freeze):
        model.param(operation.param).requires_grad_(not operation.frozen)
    elif isinstance(operation, Assign):
        param = model.param(operation.param)
        param.grad = assigned(param.detach(), rank, operation.odd)
    elif isinstance(operation, Alone):
        if operation.rank == rank:
            _execute_alone(ours, step, operation)
    elif operation.by_rank[rank]:
        try:
            _execute_backward(ours, rank, step, operation)
        except Stop:
            return "Stop"
        except RuntimeError as error:
            if MAY_RAISE not in str(error):
                raise
            return MAY_RAISE
    return ""


def _execute_alone(ours: fastddp.DistributedDataParallel, step: int, alone: Alone) -> None:
    x = _leaf(factor(alone.rank, step))
    if alone.what == "no_grad":
        with torch.no_grad():
            ours(x, alone.terms, reentrant=False)
        return
    loss = ours(x, alone.terms, reentrant=False)["loss"]
    if alone.what == "grad of params":
        params = [p for p in ours.parameters() if p.requires_grad]
        torch.autograd.grad(loss, params, allow_unused=True)
    elif alone.what == "grad of x":
        torch.autograd.grad(loss, x)
    elif alone.what == "inputs x":
        loss.backward(inputs=[x])


def _execute_backward(
    ours: fastddp.DistributedDataParallel, rank: int, step: int, operation: Backward
) -> None:
    before = ours.require_backward_grad_sync
    try:
        ours.require_backward_grad_sync = operation.sync != operation.forward_differs
        run_forwards = ours.module if operation.how == "direct" else ours
        losses = losses_of(run_forwards, rank, step, operation)
        ours.require_backward_grad_sync = operation.sync
        backward(ours.module, losses, operation.how)
    finally:
        ours.require_backward_grad_sync = before


def losses_of(
    forward: Callable[..., dict[str, Any]], rank: int, step: int, operation: Backward
) -> list[tuple[Tensor, Tensor]]:
    """Runs the rank's forwards; returns each one's `x` and loss."""
    losses = []
    for nth, chosen in enumerate(operation.by_rank[rank]):
        stop_at = None
        if operation.stop is not None and operation.stop[:2] == (rank, nth):
            stop_at = operation.stop[2]
        x = _leaf(factor(rank, step))
        losses.append((x, forward(x, chosen, stop_at, operation.how in REENTRANT)["loss"]))
    return losses


def backward(model: Model, losses: Sequence[tuple[Tensor, Tensor]], how: str) -> None:
    """Differentiates the losses in one of several ways."""
    if how == "list":
        torch.autograd.backward([loss for _, loss in losses])
        return
    if how == "penalty":
        # The loss of a gradient: it does not go through what the model returned.
        grads = [torch.autograd.grad(loss, x, create_graph=True)[0] for x, loss in losses]
        torch.stack(grads).sum().backward()
        return
    total = torch.stack([loss for _, loss in losses]).sum()
    if how == "inputs":
        total.backward(inputs=[p for p in model.parameters() if p.requires_grad])
    elif how == "twice":
        total.backward(retain_graph=True)
        total.backward()
    else:
        total.backward()


def _leaf(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, requires_grad=True)

"""`mixed_precision=`: the bits of a model that was cast by hand, for full-precision parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional
from torch.nn.parallel.distributed import _MixedPrecision
from torch.utils.checkpoint import checkpoint

import fastddp
from tests.models import CASES, Ladder, loss_of
from tests.parity.checks import assert_same_bits, digest, gradients, small_cap_mb
from tests.ranks import run_ranks

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LOW = _MixedPrecision(param_dtype=BF16)


def _wrap(model: nn.Module, engine: str, mixed: _MixedPrecision = LOW) -> Any:
    return fastddp.DistributedDataParallel(
        model, engine=engine, mixed_precision=mixed, bucket_cap_mb=small_cap_mb(model)
    )


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _by_hand(
    master: nn.Module, mixed: _MixedPrecision, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return the output and the ranks' average gradients of a copy that is cast as a whole."""
    low = copy.deepcopy(master)
    for param in low.parameters():
        param.data = _cast(param.data, mixed.param_dtype or param.dtype)
        param.grad = None
    for buffer in low.buffers():
        buffer.data = _cast(buffer.data, mixed.buffer_dtype or buffer.dtype)
    output = low(*(_cast(x, mixed.param_dtype or x.dtype) for x in inputs))
    loss_of(output).backward()
    averaged: dict[str, Tensor | None] = {name: p.grad for name, p in low.named_parameters()}
    masters = {name: p for name, p in master.named_parameters() if averaged[name] is not None}
    reals = [_real(averaged[name]) for name in masters]
    reduce_dtype = mixed.reduce_dtype or mixed.param_dtype
    flat = torch.cat([real.reshape(-1).to(reduce_dtype) for real in reals])
    dist.all_reduce(flat)
    pieces = (flat / dist.get_world_size()).split([real.numel() for real in reals])
    for (name, param), piece in zip(masters.items(), pieces, strict=True):
        averaged[name] = torch.empty_like(param.data)
        real = _real(averaged[name])
        real.copy_(piece.view(real.shape))
    return output.detach(), averaged


def _cases(rank: int, world_size: int, mixed: _MixedPrecision, engine: str) -> list[str]:
    digests = []
    for name, case in CASES.items():
        if name == "many_tiny":
            continue  # only numbers
        if case.has_batch_norm and mixed.buffer_dtype is not mixed.param_dtype:
            continue  # torch's batch norm on the CPU wants both alike
        ours = _wrap(case.build(), engine, mixed)
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
        dtypes = {n: p.dtype for n, p in ours.named_parameters()}
        for step in range(3):
            inputs = case.inputs(rank, step)
            dist.barrier()
            # Before ours, whose forward changes statistics.
            want_output, want = _by_hand(ours.module, mixed, inputs)
            if case.has_batch_norm and rank != 0:
                # Rank 0's buffers are only given to the others by our forward: nothing to compare.
                want_output = None
            optimizer.zero_grad()
            output = ours(*inputs)
            if want_output is not None:
                assert_same_bits({"output": output}, {"output": want_output}, f"{name}, {step}")
            loss_of(output).backward()
            got = gradients(ours.module)
            assert_same_bits(got, want, f"{name}, step {step}")
            digests.append(digest(got))
            optimizer.step()
        assert {n: p.dtype for n, p in ours.named_parameters()} == dtypes
        assert {n: t.dtype for n, t in ours.module.state_dict().items() if n in dtypes}.items() <= {
            (n.removeprefix("module."), d) for n, d in dtypes.items()
        }
    return digests


@pytest.mark.parametrize(
    "mixed",
    [
        _MixedPrecision(param_dtype=BF16),
        _MixedPrecision(param_dtype=BF16, reduce_dtype=FP32, buffer_dtype=FP32),
        _MixedPrecision(param_dtype=BF16, reduce_dtype=FP16, buffer_dtype=BF16),
        _MixedPrecision(reduce_dtype=BF16),
    ],
    ids=["bf16", "bf16, reduced in fp32", "all three", "only reduced"],
)
def test_the_bits_are_those_of_a_cast_model(mixed: _MixedPrecision, engine: str) -> None:
    by_rank = run_ranks(_cases, 2, mixed, engine)
    assert by_rank[0] == by_rank[1]


class Watching(nn.Module):
    """Notes what its forward and its backward find."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.kept = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("shift", torch.full((2,), 1 / 3))
        self.register_buffer("kept_shift", torch.full((2,), 1 / 3))
        self.register_buffer("count", torch.tensor(2))
        self._ddp_params_and_buffers_to_ignore = ["kept", "kept_shift"]
        self.seen: dict[str, torch.dtype] = {}
        self.seen_in_backward: dict[str, torch.dtype] = {}

    def look(self) -> dict[str, torch.dtype]:
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return {name: tensor.dtype for name, tensor in tensors.items()}

    def forward(self, x: Tensor, index: Tensor, *, scale: Tensor) -> dict[str, Any]:
        self.seen = {"x": x.dtype, "index": index.dtype, "scale": scale.dtype, **self.look()}
        out = self.inner(x)[index] * scale + self.frozen
        if out.requires_grad:
            out.register_hook(lambda _: self.seen_in_backward.update(self.look()))
        return {"out": out + self.shift.to(out.dtype), "kept": out * self.kept, "name": "w"}


def _what_is_seen(rank: int, world_size: int, engine: str) -> None:
    model = Watching()
    before = model.look()
    mixed = _MixedPrecision(param_dtype=BF16, buffer_dtype=FP16)
    ours = _wrap(model, engine, mixed)
    outside = {**before, "shift": FP16}
    inside = {**outside, "inner.weight": BF16, "inner.bias": BF16, "frozen": BF16}
    assert ours.mixed_precision is mixed
    for name, param in model.named_parameters():  # what torch's class puts there
        assert hasattr(param, "_mp_param") == hasattr(param, "_fp_param") == (name != "kept")
        if name != "kept":
            assert (param._mp_param.dtype, param._mp_param.shape) == (BF16, param.shape)
            assert param._fp_param.data_ptr() == param.data_ptr()
            assert param._fp_param.dtype is FP32
    call = (torch.ones(4, 3), torch.tensor([0, 1]))

    params = list(model.parameters())
    output = ours(*call, scale=torch.ones(2, dtype=torch.float64))
    assert model.seen == {"x": BF16, "index": torch.int64, "scale": BF16, **inside}
    assert output["out"].dtype is BF16
    assert output["kept"].dtype is FP32
    assert output["name"] == "w"
    assert model.look() == outside
    (output["out"].sum() + output["kept"].sum()).backward()
    assert model.seen_in_backward == inside
    assert model.look() == outside
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
    assert {n: p.grad.dtype for n, p in model.named_parameters() if p.grad is not None} == {
        "inner.weight": FP32,
        "inner.bias": FP32,
        "kept": FP32,
    }
    ours.eval()
    with torch.no_grad():
        ours(*call, scale=torch.ones(2))
    assert model.seen["inner.weight"] is BF16
    assert model.look() == outside


def test_modules_see_low_precision_and_everybody_else_full(engine: str) -> None:
    run_ranks(_what_is_seen, 2, engine)


class Segments(nn.Module):
    """Runs segments that use parameters directly and by modules, under checkpoints or not."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run
        self.weight = nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4))
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def segment(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(functional.linear(self.dropout(x), self.weight)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.segment, self.run(self.segment, x))


def _plainly(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def _with_reentry(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(function, *args, use_reentrant=True)


def _without_reentry(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)


def _checkpoints(rank: int, world_size: int, engine: str) -> None:
    models: dict[str, Any] = {}
    for run in (_plainly, _with_reentry, _without_reentry):
        torch.manual_seed(0)
        models[run.__name__] = _wrap(Segments(run), engine)
    for step in range(3):
        got = {}
        for name, model in models.items():
            torch.manual_seed(10 * step + rank)
            x = torch.randn(5, 4, requires_grad=True)
            model.zero_grad()
            model(x).square().sum().backward()
            got[name] = gradients(model.module)
            assert model.module.weight.dtype is FP32
        assert_same_bits(got["_without_reentry"], got["_plainly"], f"step {step}")
        # Re-entrant ones give each segment's gradient apart, and they are added in float32.
        for name, grad in got["_plainly"].items():
            torch.testing.assert_close(got["_with_reentry"][name], grad, rtol=2e-2, atol=2e-2)

    # A checkpoint around the wrapper: its forward runs in backward.
    around = models["_plainly"]
    for run in (_plainly, _with_reentry, _without_reentry):
        torch.manual_seed(rank)
        x = torch.randn(5, 4, requires_grad=True)
        around.zero_grad()
        run(around, x).square().sum().backward()
        got[run.__name__] = gradients(around.module)
        assert all(type(p) is nn.Parameter for p in around.module.parameters())
    assert_same_bits(got["_without_reentry"], got["_plainly"], "around")
    assert_same_bits(got["_with_reentry"], got["_plainly"], "around")


def test_checkpoints_recompute_in_low_precision(engine: str) -> None:
    run_ranks(_checkpoints, 2, engine)


class Raising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.fails = ""

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        if self.fails == "forward":
            raise ValueError("on purpose")
        if self.fails == "backward":
            out.register_hook(self.fail)
        return out

    def fail(self, _: Tensor) -> None:
        raise ValueError("on purpose")


def _failures(rank: int, world_size: int, engine: str) -> None:
    model = Raising()
    ours = _wrap(model, engine)
    weight = model.linear.weight
    for model.fails in ("forward", "backward", ""):
        ours.zero_grad()
        if model.fails:
            with pytest.raises(ValueError, match="on purpose"):
                ours(torch.ones(1, 2)).sum().backward()
        else:
            ours(torch.ones(1, 2) * (rank + 1)).sum().backward()
        assert model.linear.weight is weight, model.fails
    assert weight.grad.tolist() == [[1.5, 1.5], [1.5, 1.5]]


def test_an_exception_leaves_the_parameters_in_place(engine: str) -> None:
    run_ranks(_failures, 2, engine)


class Recurrent(nn.Module):
    """An LSTM, which keeps references to its parameters, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2)
        self.back = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.back(self.lstm(x)[0]))[0]


def _recurrent(rank: int, world_size: int, engine: str) -> None:
    torch.manual_seed(0)
    ours = _wrap(Recurrent(), engine)
    weights = list(ours.module.lstm._flat_weights)
    flattened: list[int] = []
    ours.module.lstm.flatten_parameters = lambda: flattened.append(1)  # it moves parameters
    for step in range(2):
        x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(10 * step + rank))
        ours.zero_grad()
        _, want = _by_hand(ours.module, LOW, (x,))
        flattened.clear()  # by the copy
        loss_of(ours(x)).backward()
        assert not flattened
        assert_same_bits(gradients(ours.module), want, f"step {step}")
    lstm = ours.module.lstm
    del lstm.flatten_parameters
    assert all(a is b for a, b in zip(weights, lstm._flat_weights, strict=True))
    twin = copy.deepcopy(ours)  # it would fail on references into a graph
    assert loss_of(twin(x)) == loss_of(ours(x))


def test_recurrent_modules(engine: str) -> None:
    run_ranks(_recurrent, 2, engine)


def _accumulation(rank: int, world_size: int, engine: str) -> None:
    """Low-precision gradients are summed in float32, and only their average is rounded."""
    model = nn.Linear(1, 1, bias=False)
    ours = _wrap(model, engine)
    with ours.no_sync():
        ours(torch.full((1, 1), 256.0)).sum().backward()
    with ours.no_sync():
        ours(torch.full((1, 1), 1.0)).sum().backward()
    assert model.weight.grad.item() == 257.0, "bfloat16 has no 257"
    ours(torch.full((1, 1), 3.0)).sum().backward()
    assert model.weight.grad.item() == 260.0
    # Two forwards, one backward, and a parameter outside of forward: it is the real one.
    ours.zero_grad()
    loss = ours(torch.ones(1, 1)).sum() + ours(torch.full((1, 1), 2.0)).sum()
    (loss.float() + model.weight.sum() * 257).backward()
    assert model.weight.grad.item() == 260.0
    (grad,) = torch.autograd.grad(ours(torch.ones(1, 1)).sum(), [model.weight])
    assert (grad.dtype, grad.item()) == (FP32, 1.0)
    assert type(model.weight) is nn.Parameter


def test_accumulation_is_in_full_precision(engine: str) -> None:
    run_ranks(_accumulation, 2, engine)


def _transparently(rank: int, world_size: int, engine: str) -> None:
    case = CASES["transformer"]
    ours = _wrap(case.build(), engine)
    wrapped = fastddp.wrap(case.build(), engine=engine, mixed_precision=LOW)
    copied = copy.deepcopy(wrapped)
    for model in (ours, wrapped, copied):
        loss_of(model(*case.inputs(rank, 0))).backward()
    assert wrapped.embed.weight.dtype is FP32
    assert all(t.dtype is FP32 for t in wrapped.state_dict().values())
    assert_same_bits(gradients(wrapped), gradients(ours.module), "wrap")
    assert_same_bits(gradients(copied), gradients(ours.module), "a copy")
    copied.register_comm_hook(None, default_hooks.allreduce_hook)  # takes the place of ours
    copied.zero_grad()
    loss_of(copied(*case.inputs(rank, 1))).backward()
    assert gradients(copied)["layer.linear1.weight"].abs().sum() > 0


def test_wrapping_transparently_and_copies(engine: str) -> None:
    run_ranks(_transparently, 2, engine)


def test_a_world_of_one() -> None:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 257.0)
    alone = fastddp.wrap(model, mixed_precision=_MixedPrecision(param_dtype=BF16))
    output = alone(torch.ones(1, 2))
    assert (output.dtype, output.item()) == (BF16, 512.0)
    output.sum().backward()
    assert model.weight.grad.dtype is FP32
    assert model.weight.tolist() == [[257.0, 257.0]]


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(7, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def _compiled(rank: int, world_size: int, engine: str, around: bool) -> None:
    dtypes: list[set[torch.dtype]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        dtypes.append({x.dtype for x in inputs if isinstance(x, Tensor)})
        return graph.forward

    eager, ours = _wrap(Compiled(), engine), _wrap(Compiled(), engine)
    compiled = torch.compile(ours, backend=backend) if around else ours
    if not around:
        ours.compile(backend=backend)
    for step in range(3):
        for model in (eager, compiled):
            model.zero_grad()
            loss_of(model(*CASES["mlp"].inputs(rank, step))).backward()
        assert_same_bits(gradients(ours.module), gradients(eager.module), f"step {step}")
    assert {BF16} in dtypes
    assert len(dtypes) < 4, "compiled again and again"
    assert set.union(*dtypes) == {BF16}


@pytest.mark.parametrize("around", [False, True], ids=["inside", "around"])
def test_compiled_models_compute_in_low_precision(around: bool, engine: str) -> None:
    run_ranks(_compiled, 2, engine, around)


def _sparse(rank: int, world_size: int, engine: str) -> None:
    model = nn.Embedding(5, 2, sparse=True)
    ours = _wrap(model, engine, _MixedPrecision(param_dtype=BF16, reduce_dtype=FP32))
    for _ in range(2):
        ours.zero_grad()
        ours(torch.tensor([rank, 2])).sum().backward()
        grad = model.weight.grad
        assert grad.is_sparse
        assert grad.dtype is FP32
        assert grad.to_dense()[:, 0].tolist() == [0.5, 0.5, 1.0, 0.0, 0.0]


def test_sparse_gradients(engine: str) -> None:
    run_ranks(_sparse, 2, engine)


def _overflow(rank: int, world_size: int, engine: str) -> None:
    """The sum is made before the division, as torch does it."""
    model = nn.Linear(1, 1, bias=False)
    ours = _wrap(model, engine, _MixedPrecision(reduce_dtype=FP16))
    ours(torch.full((1, 1), 60000.0)).sum().backward()
    assert model.weight.grad.item() == float("inf")


def test_a_sum_beyond_float16_is_infinite(engine: str) -> None:
    run_ranks(_overflow, 2, engine)


@pytest.mark.parametrize(
    ("mixed", "says"),
    [
        (object(), r"mixed_precision must be .*_MixedPrecision, got builtins\.object"),
        (_MixedPrecision(param_dtype=torch.int8), r"mixed_precision\.param_dtype .*torch\.int8"),
        (_MixedPrecision(reduce_dtype="fp16"), r"mixed_precision\.reduce_dtype .*'fp16'"),
    ],
)
def test_bad_ones_are_refused(mixed: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fastddp.wrap(Ladder(), mixed_precision=mixed)


def _different(rank: int, world_size: int, engine: str) -> None:
    with pytest.raises(fastddp.MismatchError, match=r"rank 1 and rank 0.*float16.*bfloat16"):
        _wrap(Ladder(), engine, _MixedPrecision(reduce_dtype=FP16 if rank else BF16))


def test_ranks_with_different_dtypes_are_told_so(engine: str) -> None:
    run_ranks(_different, 2, engine)

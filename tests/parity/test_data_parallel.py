"""`DataParallel` on CPU replicas, against the same pieces run one after the other in one thread.

torch's own class passes a call through where there is no GPU, so that it cannot be the reference
here: what it promises is computed by hand. With two GPUs, it is: `tests/gpu`. Replicas with copies
of the parameters, as on GPUs, are in `test_data_parallel_copies.py`.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import time
import types
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import fastddp
from fastddp.data_parallel.scatter import gather, scatter
from fastddp.data_parallel.workers import Workers
from tests.models import CASES, ConvNet, loss_of
from tests.parity.checks import assert_same_bits, bits, gradients

CPU = torch.device("cpu")
TWO, THREE, FOUR = (["cpu"] * count for count in (2, 3, 4))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """How sums are grouped depends on the number of intra-op threads, which replicas divide."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Scale(nn.Module):
    """The gradient of its parameter is the sum over the batch of whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.weight * x * self.gain


class Call(nn.Module):
    """Runs a function as its forward, with itself as the first argument."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def spread(function: Callable[..., Any], devices: list[str] = TWO, **parts: nn.Module) -> Any:
    return fastddp.DataParallel(Call(function, **parts), devices)


# --- gradients ------------------------------------------------------------------------------------


def one_by_one(
    model: nn.Module, inputs: tuple[Tensor, ...], count: int
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Return what torch's class promises: the joint output, and gradients added in replica order.

    The first piece runs the model itself, the others copies of its buffers.
    """
    pieces = list(zip(*(tensor.chunk(count) for tensor in inputs), strict=True))
    params = dict(model.named_parameters())
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = [model(*pieces[0])]
    for piece in pieces[1:]:
        own = {name: buffer.clone() for name, buffer in start.items()}
        outputs.append(functional_call(model, params | own, piece))
    joint = torch.cat(outputs).detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(joint), joint)
    totals: dict[str, Tensor | None] = dict.fromkeys(params)
    wanted = [name for name, param in params.items() if param.requires_grad]
    for output, piece_grad in zip(outputs, grad.split([len(o) for o in outputs]), strict=True):
        found = torch.autograd.grad(
            output, [params[name] for name in wanted], piece_grad, allow_unused=True
        )
        for name, part in zip(wanted, found, strict=True):
            total = totals[name]
            if part is not None:
                totals[name] = part if total is None else total + part
    return joint.detach(), totals


@pytest.mark.parametrize("devices", [TWO, THREE], ids=len)
@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_the_pieces_one_by_one(name: str, devices: list[str]) -> None:
    assert_bits_of_pieces(name, devices)


def assert_bits_of_pieces(name: str, devices: list[str]) -> None:
    """Compare a model of `CASES`, on replicas, with its pieces one by one."""
    case = CASES[name]
    model, reference = case.build(), case.build()
    ours = fastddp.DataParallel(model, devices)
    for step in range(2):
        inputs = case.whole_batch(2, step)
        model.zero_grad()
        output = ours(*inputs)
        loss_of(output).backward()
        want_output, want = one_by_one(reference, inputs, len(devices))
        assert bits(output) == bits(want_output)
        assert_same_bits(gradients(model), want, f"step {step}")
        assert_same_bits(dict(model.named_buffers()), dict(reference.named_buffers()), "buffers")


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.has_batch_norm])
def test_training_is_that_of_the_plain_module_on_the_whole_batch(name: str) -> None:
    case = CASES[name]
    models = case.build(torch.float64 if name not in ("complex", "mixed_dtypes") else None), None
    plain, ours = models[0], fastddp.DataParallel(copy.deepcopy(models[0]), THREE)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, ours)]
    double = next(plain.parameters()).dtype == torch.float64
    for step in range(4):
        inputs = case.whole_batch(2, step, torch.float64 if double else None)
        losses = []
        for model, optimizer in zip((plain, ours), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(loss_of(model(*inputs)))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(list(ours.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("slow", range(4))
def test_the_order_of_the_sum_is_the_replicas_and_not_the_threads(slow: int) -> None:
    def forward(module: Call, x: Tensor) -> Tensor:
        if x.item() == batch[slow].item():
            time.sleep(0.02)
        return module.scale(x)

    # In float32 only this order gives 1: 1e8 swallows what is added to it.
    batch = torch.tensor([[1e8], [3.0], [-1e8], [1.0]])
    model = spread(forward, FOUR, scale=Scale())
    for _ in range(3):
        model.zero_grad()
        model(batch).sum().backward()
        assert model.module.scale.weight.grad.item() == 1.0


def test_second_derivatives_go_through() -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    x = torch.arange(1.0, 5.0)
    weight = model.module.weight
    (first,) = torch.autograd.grad((model(x) ** 3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert second.item() == 6 * (x**3).sum().item()


def test_two_forwards_one_backward_and_gradients_of_inputs() -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    x = torch.arange(1.0, 6.0, requires_grad=True)
    (model(x).sum() + 2 * model(x).sum()).backward()
    assert model.module.weight.grad.item() == 3 * 15
    assert x.grad.tolist() == [3.0] * 5


def test_a_retained_graph_runs_twice_and_accumulates() -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    loss = model(torch.arange(1.0, 5.0)).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert model.module.weight.grad.item() == 2 * 60


def test_a_parameter_written_to_before_backward_is_noticed() -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    loss = (model(torch.ones(4, requires_grad=True)) ** 2).sum()
    with torch.no_grad():
        model.module.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_of_parameters_see_the_sum_once() -> None:
    model = fastddp.DataParallel(Scale(), THREE)
    seen: list[float] = []
    model.module.weight.register_hook(lambda grad: seen.append(grad.item()))
    after: list[float] = []
    model.module.weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.item()))
    model(torch.arange(1.0, 7.0)).sum().backward()
    assert seen == after == [21.0]


@pytest.mark.parametrize("used_from", [0, 2], ids=["by both", "by the second"])
def test_sparse_gradients(used_from: int) -> None:
    plain = nn.Embedding(10, 3, sparse=True)
    model = spread(
        lambda module, x: module.net(x) if x[0] >= used_from else torch.zeros(len(x), 3),
        net=copy.deepcopy(plain),
    )
    rows = torch.tensor([1, 1, 2, 9])
    model(rows).sum().backward()
    plain(rows[used_from:]).sum().backward()
    assert model.module.net.weight.grad.is_sparse
    assert torch.equal(model.module.net.weight.grad.to_dense(), plain.weight.grad.to_dense())


# --- replicas -------------------------------------------------------------------------------------


def test_replicas_share_the_parameters_memory_and_are_kept() -> None:
    seen: list[dict[str, Tensor]] = []
    model = spread(
        lambda module, x: (seen.append(dict(module.named_parameters())), module.net(x))[1],
        net=ConvNet(),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()
    params = dict(model.module.named_parameters())
    assert len(seen) == 6
    assert [replica.keys() for replica in seen] == [params.keys()] * 6
    for name, param in params.items():
        assert {replica[name].data_ptr() for replica in seen} == {param.data_ptr()}
        assert len({id(replica[name]) for replica in seen}) == 2, "one for each replica, kept"


def test_only_the_first_replicas_writes_to_buffers_stay() -> None:
    def forward(module: Call, x: Tensor) -> Tensor:
        module.norm.running_mean.fill_(x[0, 0].item())
        module.norm.num_batches_tracked.add_(int(x[0, 0]))
        module.counter = getattr(module, "counter", 0) + 1
        return x + module.norm.num_batches_tracked

    model = spread(forward, norm=nn.BatchNorm1d(1))
    for step in range(1, 3):
        output = model(torch.tensor([[5.0], [7.0]]))
        assert output.flatten().tolist() == [5 + 5 * step, 7 + 5 * (step - 1) + 7]
        assert model.module.norm.running_mean.item() == 5
        assert model.module.norm.num_batches_tracked.item() == 5 * step
    assert not hasattr(model.module, "counter"), "attributes of replicas are lost, as in torch"


def test_a_write_to_one_buffer_does_not_invalidate_another_for_backward() -> None:
    def forward(module: Call, x: Tensor) -> Tensor:
        product = module.norm.running_var * (module.norm.weight * x)  # saves running_var
        module.norm.running_mean.add_(1)
        return product

    model = spread(forward, norm=nn.BatchNorm1d(1))
    model(torch.ones(4, 1)).sum().backward()
    assert model.module.norm.weight.grad.item() == 4


def _assign_attribute(scale: Scale) -> float:
    scale.gain = 3.0
    return 3.0


def _write_in_place(scale: Scale) -> float:
    with torch.no_grad():
        scale.weight.fill_(4.0)
    return 4.0


def _write_to_data(scale: Scale) -> float:
    scale.weight.data.fill_(5.0)
    return 5.0


def _replace_data(scale: Scale) -> float:
    scale.weight.data = torch.full((1,), 6.0)
    return 6.0


def _replace_parameter(scale: Scale) -> float:
    scale.weight = nn.Parameter(torch.full((1,), 7.0))
    return 7.0


def _load(scale: Scale) -> float:
    scale.load_state_dict({"weight": torch.full((1,), 8.0), "seen": torch.tensor(0)})
    return 8.0


def _convert(scale: Scale) -> float:
    scale.double().weight.data.fill_(11.0)
    return 11.0


def _hook(scale: Scale) -> float:
    scale.register_forward_hook(lambda _module, _args, output: output * 9)
    return 9.0


def _bind_forward(scale: Scale) -> float:
    def forward(self: Scale, x: Tensor) -> Tensor:
        assert self is not scale, "the replica's forward, on the replica"
        return self.weight * x * 10

    scale.forward = types.MethodType(forward, scale)
    return 10.0


@pytest.mark.parametrize(
    "change",
    [
        *(_assign_attribute, _write_in_place, _write_to_data, _replace_data, _replace_parameter),
        *(_load, _hook, _bind_forward, _convert),
    ],
)
def test_changes_between_steps_are_seen(change: Callable[[Scale], float]) -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    x = torch.arange(1.0, 5.0)
    assert torch.equal(model(x), x)
    factor = change(model.module)
    assert torch.equal(model(x), factor * x)
    model(x).sum().backward()
    assert model.module.weight.grad is not None


def test_a_sliced_parameter_is_seen_though_its_memory_begins_where_it_did() -> None:
    model = fastddp.DataParallel(nn.Linear(2, 4, bias=False), TWO)
    x = torch.randn(4, 2)
    full = model(x)
    model.module.weight.data = model.module.weight.data[:3]
    assert torch.equal(model(x), full[:, :3])


@pytest.mark.parametrize("flags", [(True, False, True), (False, True)])
def test_requires_grad_may_be_switched_both_ways(flags: tuple[bool, ...]) -> None:
    model = fastddp.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), TWO)
    for flag in flags:
        model.module[0].requires_grad_(flag)
        model.zero_grad()
        model(torch.ones(4, 2)).sum().backward()
        assert [p.grad is not None for p in model.parameters()] == [flag, flag, True, True]


def test_train_and_eval_reach_the_replicas() -> None:
    model = spread(lambda module, x: x * module.training, scale=Scale())
    assert model.eval() is model
    assert model(torch.ones(4)).sum() == 0
    assert model.train()(torch.ones(4)).sum() == 4


def test_a_submodule_may_be_replaced_or_used_twice() -> None:
    inner = nn.Linear(2, 2)
    model = fastddp.DataParallel(nn.Sequential(inner, nn.Tanh(), inner), TWO)
    plain = copy.deepcopy(model.module)
    x = torch.randn(4, 2)
    assert torch.allclose(model(x), plain(x))
    for m in (model.module, plain):
        m[1] = nn.Identity()
        m(x).sum().backward()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(model.module[0].weight.grad, plain[0].weight.grad)


def test_parameters_swapped_for_one_call() -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    x, weight = torch.ones(4), torch.full((1,), 3.0, requires_grad=True)
    outer = nn.Sequential(model)  # functional_call refuses torch's class itself
    output = functional_call(outer, {"0.module.weight": weight * 2}, (x,))
    output.sum().backward()
    assert output.tolist() == [6.0] * 4
    assert weight.grad.item() == 8
    assert model.module.weight.grad is None
    assert torch.equal(model(x), x)


def test_replicas_have_parameters_of_their_own_to_iterate() -> None:
    def forward(module: Call, x: Tensor) -> Tensor:
        assert next(module.parameters()).device == CPU
        penalty = sum(p.square().sum() for p in module.parameters())
        return sum(p * x for p in module.list) + penalty

    model = spread(forward, list=nn.ParameterList([torch.ones(1), torch.ones(1)]))
    model(torch.ones(4)).sum().backward()
    assert [p.grad.item() for p in model.parameters()] == [4 + 2 * 4] * 2


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.LSTM(3, 4, batch_first=True), (4, 5, 3)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (4, 3)),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).eval(), (4, 3)),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), (4, 3, 4)),
        (lambda: nn.Sequential(OrderedDict(a=nn.Linear(3, 3), b=nn.ReLU())), (4, 3)),
    ],
    ids=["lstm", "weight_norm", "spectral_norm", "transformer", "sequential"],
)
def test_modules_with_ways_of_their_own(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    plain = make()
    model = fastddp.DataParallel(copy.deepcopy(plain), TWO)
    x = torch.randn(shape)
    for _ in range(2):
        for m in (plain, model):
            m.zero_grad()
            loss_of(first(m(x))).backward()
        for got, want in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad)


def test_references_that_modules_keep_elsewhere_are_the_replicas() -> None:
    model = fastddp.DataParallel(nn.LSTM(3, 4), TWO)
    for replica in model.replicate(model.module, model.device_ids):
        own = list(replica.parameters())
        assert len(own) == 4
        assert all(a is b for a, b in zip(replica._flat_weights, own, strict=True))


def test_submodules_of_a_module_with_its_own_assignment_stay_its_own() -> None:
    class Particular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scale()

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = fastddp.DataParallel(Particular(), TWO)
    inner = model.module.inner
    model(torch.arange(4.0)).sum().backward()
    assert model.module.inner is inner
    assert inner.seen.item() == 1
    assert inner.weight.grad.item() == 6


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_script_modules() -> None:
    plain = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model = fastddp.DataParallel(torch.jit.script(plain), TWO)
    model(torch.randn(4, 3)).square().sum().backward()
    model(torch.randn(4, 3))
    assert all(p.grad is not None for p in model.parameters())
    assert model.module[1].num_batches_tracked.item() == 2


def test_a_forward_that_writes_to_shared_parameters_is_refused() -> None:
    model = fastddp.DataParallel(nn.Sequential(nn.Embedding(4, 2, max_norm=0.1)), TWO)
    with pytest.raises(RuntimeError, match=r"wrote to the parameter 0\.weight.*max_norm"):
        model(torch.arange(4))
    model.module[0].max_norm = None
    model(torch.arange(4)).sum().backward()
    assert model.module[0].weight.grad.sum() == 8


def test_compiled_modules_are_refused() -> None:
    model = fastddp.DataParallel(nn.Sequential(nn.Linear(2, 2)), TWO)
    model.module[0]._compiled_call_impl = lambda *_: None  # what .compile() sets
    with pytest.raises(NotImplementedError, match="Linear is compiled"):
        model(torch.ones(4, 2))


def test_lazy_modules_are_refused_before_their_first_forward() -> None:
    with pytest.raises(RuntimeError, match="uninitialized parameters can't be used"):
        fastddp.DataParallel(nn.LazyLinear(2), TWO)(torch.ones(4, 2))


# --- inputs and outputs ---------------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")  # the untyped kind must work too


@dataclass
class Record:
    value: Any
    derived: Any = field(init=False, default=None)


@dataclass(frozen=True)
class Frozen:
    value: Any


def test_arguments_of_every_kind() -> None:
    calls: dict[int, Any] = {}

    def forward(module: Call, *args: Any, **kwargs: Any) -> Tensor:
        calls[int(args[0][0])] = (args, kwargs)
        return args[0]

    marker = object()
    x = torch.arange(4)
    default = defaultdict(list, {"x": x})
    model = spread(forward)
    model(x, [x, "text"], (x, None), {"x": x, 1: marker}, Pair(x, 2), y=Frozen([x]), z=default)
    assert sorted(calls) == [0, 2]
    for start, (args, kwargs) in calls.items():
        piece = [start, start + 1]
        assert args[0].tolist() == piece
        assert [args[1][0].tolist(), args[1][1]] == [piece, "text"]
        assert args[2][0].tolist() == piece
        assert args[2][1] is None
        assert args[3]["x"].tolist() == piece
        assert args[3][1] is marker
        assert type(args[4]) is Pair
        assert (args[4].first.tolist(), args[4].second) == (piece, 2)
        assert type(kwargs["y"]) is Frozen
        assert kwargs["y"].value[0].tolist() == piece
        assert type(kwargs["z"]) is defaultdict
        assert kwargs["z"]["x"].tolist() == piece
        assert kwargs["z"]["new"] == []


def test_outputs_of_every_kind() -> None:
    def forward(module: Call, x: Tensor) -> Any:
        record = Record(x)
        record.derived = 2 * x
        return {
            "list": [x, None],
            "tuple": (x, "text"),
            "named": Pair(x, 1.5),
            "ordered": OrderedDict(x=x),
            "record": record,
            "frozen": Frozen({"x": x}),
            "max": x.unsqueeze(1).max(1),
            "sum": x.sum(),
            "empty": (),
            3: None,
        }

    output = spread(forward, THREE)(torch.arange(5.0))
    want = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert output["list"][0].tolist() == want
    assert output["list"][1] is None
    assert (output["tuple"][0].tolist(), output["tuple"][1]) == (want, "text")
    assert type(output["named"]) is Pair
    assert (output["named"].first.tolist(), output["named"].second) == (want, 1.5)
    assert type(output["ordered"]) is OrderedDict
    assert type(output["record"]) is Record
    assert output["record"].value.tolist() == want
    assert output["record"].derived.tolist() == [2 * value for value in want]
    assert output["frozen"].value["x"].tolist() == want
    assert type(output["max"]) is torch.return_types.max
    assert output["max"].values.tolist() == want
    assert output["sum"].tolist() == [1.0, 5.0, 4.0], "one per replica"
    assert output["empty"] == ()
    assert output[3] is None


@pytest.mark.parametrize(("rows", "replicas"), [(1, 1), (3, 3), (4, 4), (5, 3), (8, 4), (9, 3)])
def test_small_and_uneven_batches(rows: int, replicas: int) -> None:
    """As `chunk`: 5 rows on 4 devices are 2, 2 and 1."""
    sizes: list[int] = []
    model = spread(
        lambda module, x: (sizes.append(len(x)), module.scale(x))[1], FOUR, scale=Scale()
    )
    x = torch.arange(float(rows))
    for _ in range(2):
        model.zero_grad()
        assert torch.equal(model(x), x)
        model(x).sum().backward()
        assert model.module.scale.weight.grad.item() == x.sum().item()
    assert len(sizes) == 4 * replicas
    assert sum(sizes) == 4 * rows


def test_an_empty_batch() -> None:
    model = fastddp.DataParallel(nn.Linear(3, 2), TWO)
    output = model(torch.empty(0, 3))
    assert output.shape == (0, 2)
    output.sum().backward()
    assert model.module.weight.grad.abs().sum() == 0


def test_keywords_only_and_no_arguments_and_no_tensors() -> None:
    calls: list[Any] = []

    def forward(module: Call, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((args, kwargs))
        return torch.ones(1) * len(calls)

    model = spread(forward)
    assert model(x=torch.zeros(4)).shape == (2,)
    assert [(args, len(kwargs["x"])) for args, kwargs in calls] == [((), 2)] * 2
    calls.clear()
    assert model().shape == (1,), "nothing to split: one replica"
    assert calls == [((), {})]
    calls.clear()
    assert model(5, flag=True).shape == (2,), "nothing to split: all replicas"
    assert calls == [((5,), {"flag": True})] * 2
    calls.clear()
    assert model(5, x=torch.zeros(1)).shape == (1,), "one row: one replica"
    assert len(calls) == 1


def test_another_dimension() -> None:
    model = fastddp.DataParallel(nn.Identity(), TWO, dim=1)
    x = torch.arange(12.0).view(3, 4)
    assert torch.equal(model(x), x)
    pieces, _ = model.scatter((x,), {}, model.device_ids)
    assert [piece.shape for (piece,) in pieces] == [(3, 2), (3, 2)]


def test_replicas_may_write_to_their_inputs() -> None:
    model = spread(lambda module, x: x.mul_(module.scale.weight), FOUR, scale=Scale())
    for _ in range(20):
        model.zero_grad()
        model(torch.full((8,), 2.0)).sum().backward()
        assert model.module.scale.weight.grad.item() == 16


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.ones(4, 2), torch.ones(1, 2)), r"into 1 piece\(s\).*\(1, 2\).* into 2,.*\(2, 2\)"),
        ((torch.ones(4), torch.tensor(1.0)), r"shape \(\) along dimension 0; pass a Python number"),
    ],
)
def test_inputs_that_do_not_split_alike_are_refused(
    inputs: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spread(lambda _, *args: args[0])(*inputs)


@pytest.mark.parametrize(
    ("output_of", "kind", "message"),
    [
        (lambda x: len(x), TypeError, r"2 \(replica 0\) and 1 \(replica 1\); return tensors"),
        (lambda x: x if len(x) == 2 else None, TypeError, r"tensor of shape \(2,\).*None"),
        (lambda x: [x] * len(x), ValueError, "different lengths: 2 .* and 1 "),
        (lambda x: {len(x): x}, ValueError, r"different keys: \[2\] .* and \[1\]"),
        (lambda x: x.numpy(), TypeError, "not tensors"),
    ],
)
def test_outputs_that_do_not_fit_together_are_refused(
    output_of: Callable[[Tensor], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        spread(lambda _, x: output_of(x))(torch.ones(3))


def _containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=2).map(OrderedDict),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner),
        st.builds(Frozen, inner),
    )


LEAVES = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.booleans(),
    st.sampled_from(["long", "matrix"]),
)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (Record, Frozen)):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a is b or a == b


@settings(deadline=None)
@given(
    st.recursive(LEAVES, _containers, max_leaves=12),
    st.integers(1, 5),
    st.integers(0, 7),
    st.sampled_from([0, 1, -1]),
)
def test_gather_undoes_scatter(tree: Any, count: int, rows: int, dim: int) -> None:
    def grown(node: Any) -> Any:
        """Put tensors of one batch size where a leaf asks for them."""
        if node in ("long", "matrix"):
            dtype = torch.long if node == "long" else torch.float32
            return torch.arange(rows * rows).view(rows, rows).to(dtype)
        if isinstance(node, dict):
            return type(node)((key, grown(value)) for key, value in node.items())
        if isinstance(node, Pair):
            return Pair(*map(grown, node))
        if isinstance(node, (list, tuple)):
            return type(node)(map(grown, node))
        if isinstance(node, (Record, Frozen)):
            return type(node)(grown(node.value))
        return node

    tree = grown(tree)
    pieces = scatter(tree, [CPU] * count, dim)
    assert 1 <= len(pieces) <= count
    assert _same(gather(pieces, CPU, dim), tree)


# --- modes ----------------------------------------------------------------------------------------


def _modes_inside(module: Call, x: Tensor) -> dict[str, Any]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        "cache": torch.is_autocast_cache_enabled(),
        "default": torch.get_default_dtype(),
        "product": (module.net(x)).dtype,
    }


@pytest.mark.parametrize(
    "mode",
    [
        torch.enable_grad,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
    ],
    ids=["grad", "no_grad", "inference", "bfloat16", "float16"],
)
def test_the_callers_modes_hold_in_the_replicas(mode: Callable[[], Any]) -> None:
    model = spread(_modes_inside, net=nn.Linear(2, 2))
    model(torch.ones(4, 2))  # the threads exist, in no mode
    with mode():
        assert model(torch.ones(4, 2)) == _modes_inside(model.module, torch.ones(4, 2))
    assert model(torch.ones(4, 2))["grad"]


def test_a_default_dtype_holds_in_the_replicas() -> None:
    model = spread(_modes_inside, net=nn.Linear(2, 2))
    torch.set_default_dtype(torch.float64)
    try:
        assert model(torch.ones(4, 2, dtype=torch.float32))["default"] == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_training_may_follow_a_forward_without_gradients(first: Callable[[], Any]) -> None:
    model = fastddp.DataParallel(ConvNet(), TWO)
    with first():
        assert not model(torch.randn(4, 3, 8, 8)).requires_grad
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hooks_run_once_per_replica_and_the_wrappers_once() -> None:
    model = fastddp.DataParallel(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), TWO)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("wrapper"))
    model.module.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.module[0].register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    model.module[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model(torch.ones(4, 2, requires_grad=True)).sum().backward()
    counts = {call: calls.count(call) for call in calls}
    assert counts == {"wrapper": 1, "before": 2, "Linear": 2, "backward": 2}


def test_the_intra_op_threads_are_divided_and_the_callers_kept() -> None:
    model = spread(lambda _, x: torch.full_like(x, torch.get_num_threads()))
    for total, share in ((4, 2), (5, 2), (1, 1), (6, 3)):
        torch.set_num_threads(total)
        assert model(torch.zeros(2)).tolist() == [share, share]
        assert torch.get_num_threads() == total
        late: list[int] = []
        thread = threading.Thread(
            target=lambda into: into.append(torch.get_num_threads()), args=[late]
        )
        thread.start()
        thread.join()
        assert late == [total], "a thread that begins later is not affected"


# --- exceptions -----------------------------------------------------------------------------------


class Odd(Exception):
    """Cannot be made from a message alone."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code


def _fails_on_second(error: BaseException) -> Any:
    def forward(module: Call, x: Tensor) -> Tensor:
        if x[0] > 0:
            raise error
        return module.scale(x)

    return spread(forward, scale=Scale())


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, StopIteration, SystemExit])
def test_an_exception_keeps_its_type_and_names_its_replica(kind: type[BaseException]) -> None:
    model = _fails_on_second(kind("no luck"))
    with pytest.raises(kind) as caught:
        model(torch.arange(2.0))
    assert type(caught.value) is kind
    text = "".join(map(str, caught.value.args))
    assert text.startswith(
        f"Caught {kind.__name__} in replica 1 on device cpu.\nOriginal Traceback"
    )
    assert "raise error" in text, "the line that failed"
    assert "no luck" in text
    assert "\n  File" in str(caught.value), "readable, not a repr"
    assert torch.equal(model(torch.zeros(2)), torch.zeros(2)), "the threads go on"


def test_an_exception_that_needs_more_than_a_message_is_raised_itself() -> None:
    error = Odd(7, "no luck")
    with pytest.raises(Odd) as caught:
        _fails_on_second(error)(torch.arange(2.0))
    assert caught.value is error
    assert "in replica 1 on device cpu" in str(caught.value.__cause__)


def test_the_first_replicas_exception_is_raised_once_all_have_ended() -> None:
    ended: list[int] = []

    def forward(module: Call, x: Tensor) -> Tensor:
        time.sleep(0.05 * (3 - x.item()))
        ended.append(x.item())
        raise ValueError(f"piece {x.item()}")

    with pytest.raises(ValueError, match=r"(?s)in replica 0 .*piece 0"):
        spread(forward, FOUR)(torch.arange(4))
    assert sorted(ended) == [0, 1, 2, 3]


def test_an_exception_keeps_nothing_alive() -> None:
    class Watched:
        pass

    alive: list[Any] = []

    def forward(module: Call, x: Tensor) -> Any:
        activation = Watched()
        alive.append(weakref.ref(activation))
        if x[0] > 0:
            raise ValueError("no luck")
        return activation

    model = spread(forward)
    gc.collect()
    gc.disable()
    try:
        try:
            model(torch.arange(2))
        except ValueError:
            failed = True
        assert failed
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


# --- threads --------------------------------------------------------------------------------------


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("fastddp")}


def test_threads_are_kept_and_each_replica_has_its_own() -> None:
    seen: dict[int, set[int]] = defaultdict(set)
    model = spread(lambda _, x: (seen[int(x[0])].add(threading.get_ident()), x)[1], THREE)
    for _ in range(5):
        model(torch.arange(3))
    assert [len(threads) for threads in seen.values()] == [1, 1, 1]
    assert len(set.union(*seen.values())) == 3
    assert threading.get_ident() not in set.union(*seen.values())


def test_threads_end_with_the_object() -> None:
    before = _threads()
    model = fastddp.DataParallel(Scale(), FOUR)
    assert _threads() <= before, "none until there is work"  # those of earlier tests may end
    model(torch.ones(4)).sum().backward()
    ours = _threads() - before
    assert len(ours) == 4
    del model
    for thread in ours:
        thread.join(timeout=10)
        assert not thread.is_alive()


EXIT = """
import torch, fastddp
model = fastddp.DataParallel(torch.nn.Linear(2, 2), ["cpu", "cpu"])
model(torch.ones(4, 2)).sum().backward()
print("done")
"""


def test_idle_threads_do_not_hold_the_interpreter() -> None:
    command = [sys.executable, "-c", EXIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own() -> None:
    workers = Workers()
    assert workers.run([lambda: 1, lambda: 2], ["", ""]) == [1, 2]
    child = os.fork()
    if child == 0:
        results = workers.run([os.getpid, lambda: 2], ["", ""])
        os._exit(0 if results == [os.getpid(), 2] else 1)
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child waits for threads that are its parent's")
    assert status == 0


def test_several_threads_may_use_one_object() -> None:
    model = fastddp.DataParallel(ConvNet().eval(), THREE)
    batches = [
        torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)
    ]
    want = [model(batch) for batch in batches]
    wrong: list[int] = []

    def use(index: int) -> None:
        torch.set_num_threads(1)
        for _ in range(10):
            if not torch.equal(model(batches[index]), want[index]):
                wrong.append(index)

    threads = [threading.Thread(target=use, args=[index]) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nested_in_itself() -> None:
    inner = fastddp.DataParallel(Scale(), TWO)
    outer = fastddp.DataParallel(nn.Sequential(inner), TWO)
    for _ in range(2):
        outer.zero_grad()
        outer(torch.arange(8.0)).sum().backward()
        assert inner.module.weight.grad.item() == 28


# --- the class ------------------------------------------------------------------------------------


def test_the_class_is_torchs() -> None:
    module = ConvNet()
    model = fastddp.DataParallel(module, TWO)
    theirs = nn.DataParallel(ConvNet())
    assert isinstance(model, nn.DataParallel)
    assert model.module is module
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert all(key.startswith("module.") for key in model.state_dict())
    assert str(model.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    assert model.device_ids == [CPU, CPU]
    assert (model.output_device, model.src_device_obj, model.dim) == (CPU, CPU, 0)


def test_without_devices_or_with_one_the_module_is_called_as_it_is() -> None:
    calls: list[tuple[Any, int]] = []
    inner = Call(lambda module, x: (calls.append((module, threading.get_ident())), x)[1])
    x = torch.ones(3)
    fastddp.DataParallel(inner, ["cpu"])(x)
    if not torch.cuda.is_available():
        model = fastddp.DataParallel(inner)
        assert model.device_ids == []
        assert model(x) is x
    assert all(call == (inner, threading.get_ident()) for call in calls)


def test_conversions_may_swap_tensors() -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    model(torch.ones(4)).sum().backward()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model(torch.ones(4, dtype=torch.float64)).sum().backward()
    assert model.module.weight.grad.dtype == torch.float64
    assert model.module.weight.grad.item() == 8


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_work_and_share_nothing(how: str) -> None:
    model = fastddp.DataParallel(Scale(), TWO)
    x = torch.arange(1.0, 5.0)
    model(x).sum().backward()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        other = pickle.loads(pickle.dumps(model))
        stored = io.BytesIO()
        torch.save(model, stored)
    other.zero_grad()
    with torch.no_grad():
        other.module.weight.fill_(2.0)
    other(2 * x).sum().backward()
    assert torch.equal(other(x), 2 * x)
    assert torch.equal(model(x), x)
    assert model.module.weight.grad.item() == 10
    assert other.module.weight.grad.item() == 20


def test_the_parts_may_be_replaced_by_a_subclass() -> None:
    class Listing(fastddp.DataParallel):
        def gather(self, outputs: Any, output_device: Any) -> Any:
            return output_device, list(outputs)

    device, outputs = Listing(Scale(), TWO)(torch.arange(4.0))
    assert device == CPU
    assert [output.tolist() for output in outputs] == [[0.0, 1.0], [2.0, 3.0]]


def test_a_module_that_is_elsewhere_is_refused() -> None:
    model = fastddp.DataParallel(nn.Linear(2, 2), TWO)
    model.module.bias = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(RuntimeError, match=r"on device cpu \(device_ids\[0\]\).*on device: meta"):
        model(torch.ones(4, 2))


@pytest.mark.parametrize(
    ("module", "device_ids", "kind", "message"),
    [
        (lambda x: x, TWO, TypeError, "expected a torch.nn.Module, got function"),
        (nn.Linear(1, 1), [], ValueError, "device_ids is empty"),
        (nn.Linear(1, 1), ["cpu", "meta:0"], ValueError, "several types, cpu, meta:0"),
    ],
)
def test_unfit_arguments_are_refused(
    module: Any, device_ids: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        fastddp.DataParallel(module, device_ids)


def test_what_is_wrapped_for_several_processes_gets_no_replicas() -> None:
    wrapped = fastddp.wrap(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"the module is wrapped.*Transparent.*\.module"):
        fastddp.DataParallel(wrapped, TWO)
    with pytest.raises(ValueError, match=r"its submodule '1' is wrapped.*\.module"):
        fastddp.DataParallel(nn.Sequential(nn.Tanh(), wrapped), TWO)
    x = torch.ones(4, 1)
    for module, devices in ((wrapped, ["cpu"]), (wrapped.module, TWO)):
        assert torch.equal(fastddp.DataParallel(module, devices)(x), wrapped(x))

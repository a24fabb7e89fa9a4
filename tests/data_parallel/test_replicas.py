"""The replicas share the parameters of the module and follow every change of it."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastddp
from tests.data_parallel.common import CPU, TWO, Call, Scale, spread
from tests.models import ConvNet, loss_of


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

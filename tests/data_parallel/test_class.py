"""`DataParallel` is a subclass of torch's class and refuses what cannot work."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn

import fastddp
from tests.data_parallel.common import CPU, TWO, Call, Scale
from tests.models import ConvNet


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

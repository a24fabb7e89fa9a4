"""`DataParallel` on GPUs, against torch's class, a reference there, and the plain module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastddp
from fastddp.data_parallel import stand_ins
from fastddp.data_parallel.stand_ins import _buckets
from tests.gpu.common import ONE_GPU, TWO_GPUS, Late, delay, device_events, other_streams
from tests.models import CASES, loss_of

pytestmark = ONE_GPU
two_gpus = TWO_GPUS[-1]


def test_two_replicas_on_one_gpu_share_memory() -> None:
    plain = CASES["transformer"].build().cuda()
    model = fastddp.DataParallel(copy.deepcopy(plain), ["cuda:0", "cuda:0"])
    (tokens,) = CASES["transformer"].whole_batch(2, 0)
    for m, x in ((plain, tokens.cuda()), (model, tokens)):  # inputs are moved
        loss_of(m(x)).backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    first, second = model.replicate(model.module, model.device_ids)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr()


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the models of the tests several buckets."""
    monkeypatch.setattr(stand_ins, "_BUCKET_BYTES", 500)


@two_gpus
@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("name", [name for name in CASES if name != "odd_shapes"])
def test_training_on_two_gpus_is_that_of_torchs_class(name: str) -> None:
    case = CASES[name]
    ours = fastddp.DataParallel(case.build().cuda(), [0, 1])
    theirs = nn.DataParallel(case.build().cuda(), [0, 1])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    for step in range(3):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model(*case.whole_batch(2, step))).backward()
            optimizer.step()
    for got, want in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want)


@two_gpus
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.has_batch_norm])
def test_two_gpus_compute_what_one_does(name: str) -> None:
    case = CASES[name]
    plain = case.build().cuda()
    model = fastddp.DataParallel(copy.deepcopy(plain), [0, 1])
    for step in range(2):
        inputs = case.whole_batch(2, step)
        for m in (plain, model):
            m.zero_grad()
        loss_of(plain(*(x.cuda() for x in inputs))).backward()
        loss_of(model(*inputs)).backward()
        for got, want in zip(model.parameters(), plain.parameters(), strict=True):
            assert (got.grad is None) == (want.grad is None)
            if got.grad is not None:
                assert got.grad.device == torch.device("cuda", 0)
                torch.testing.assert_close(got.grad, want.grad)


@two_gpus
@pytest.mark.usefixtures("small_buckets")
def test_the_sum_has_the_same_bits_every_time() -> None:
    case = CASES["mlp"]
    model = fastddp.DataParallel(case.build().cuda(), [0, 1])
    seen = []
    for _ in range(5):
        model.zero_grad()
        loss_of(model(*case.whole_batch(2, 0))).backward()
        seen.append([param.grad.clone() for param in model.parameters()])
    for again in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], again, strict=True))


@two_gpus
def test_an_evaluation_sends_the_parameters_once() -> None:
    model = fastddp.DataParallel(nn.Linear(3, 2).cuda(), [0, 1])
    seen: list[int] = []
    model.module.register_forward_hook(lambda m, *_: seen.append(id(m.weight)))
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(4, 3))
    assert len(set(seen)) == 2


@two_gpus
@pytest.mark.filterwarnings("default::UserWarning")
def test_gradients_of_a_bucket_are_one_copy_between_the_devices() -> None:
    case = CASES["many_tiny"]
    model = fastddp.DataParallel(case.build().cuda(), [0, 1])
    inputs = [x.cuda() for x in case.whole_batch(2, 0)]

    def copies(run: Any) -> int:
        return len([name for name, *_ in device_events(run) if name.startswith("Memcpy PtoP")])

    loss_of(model(*inputs)).backward()
    loss = loss_of(model(*inputs))
    # Of the gradients, and of the output.
    assert copies(loss.backward) <= len(_buckets(list(model.parameters()), True)) + 1
    with torch.no_grad():
        next(model.parameters()).add_(1)  # all are sent anew
    # Of the parameters, of an input and of an output.
    assert copies(lambda: model(*inputs)) <= 3


class Delayed(nn.Module):
    """The gradients of its parameters come late, on every device."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.linear(x, Late.apply(layer.weight), Late.apply(layer.bias))
        return x


@two_gpus
@other_streams
@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("own_streams", [False, True], ids=["default streams", "own streams"])
def test_no_gradient_is_read_before_it_is_there(own_streams: bool) -> None:
    plain = Delayed().cuda()
    model = fastddp.DataParallel(copy.deepcopy(plain), [0, 1])
    devices = [torch.device("cuda", index) for index in range(2)]
    streams = [
        torch.cuda.Stream(device) if own_streams else torch.cuda.default_stream(device)
        for device in devices
    ]
    for device in devices:
        torch.cuda.synchronize(device)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(8, 16, generator=generator) for _ in range(3)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    got = []
    with torch.cuda.stream(streams[1]), torch.cuda.stream(streams[0]):
        for x in inputs:
            optimizers[0].zero_grad()
            delay()  # the parameters are not what they will be when they are sent
            loss_of(model(x)).backward()
            got += [param.grad.clone() for param in model.parameters()]
            optimizers[0].step()
    for device in devices:
        torch.cuda.synchronize(device)
    want = []
    for x in inputs:
        optimizers[1].zero_grad()
        loss_of(plain(x.cuda())).backward()
        want += [param.grad.clone() for param in plain.parameters()]
        optimizers[1].step()
    for mine, due in zip(got, want, strict=True):
        torch.testing.assert_close(mine, due)


@two_gpus
def test_copies_keep_the_layout_and_gradients_the_parameters() -> None:
    case = CASES["channels_last"]
    model = fastddp.DataParallel(case.build().cuda(), [0, 1])
    strides = {name: param.stride() for name, param in model.module.named_parameters()}
    seen: list[dict[str, tuple[int, ...]]] = []
    model.module.register_forward_hook(
        lambda m, *_: seen.append({name: p.stride() for name, p in m.named_parameters()})
    )
    loss_of(model(*case.whole_batch(2, 0))).backward()
    assert seen == [strides, strides]
    assert {name: p.grad.stride() for name, p in model.module.named_parameters()} == strides

"""`DataParallel` whose replicas have copies of the parameters, as on several GPUs.

Other devices are all that is missing: `copies` has replicas on the CPU take the path to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastddp
from fastddp.data_parallel import stand_ins
from fastddp.data_parallel.fan import Fan, _behind
from fastddp.data_parallel.packing import ALIGN_BYTES, Layout, Packing, fused_copies
from fastddp.data_parallel.replicate import Replicator
from fastddp.data_parallel.stand_ins import _buckets
from tests.data_parallel.common import Call, Scale, assert_bits_of_pieces
from tests.models import CASES, ConvNet, loss_of

CPU, META = torch.device("cpu"), torch.device("meta")
TWO, THREE = (["cpu"] * count for count in (2, 3))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give all replicas but the first copies, and the models of the tests several buckets."""
    monkeypatch.setattr(
        stand_ins, "_copied", lambda devices: [index > 0 for index in range(len(devices))]
    )
    monkeypatch.setattr(stand_ins, "_BUCKET_BYTES", 500)


# --- copies ---------------------------------------------------------------------------------------


def test_copies_are_exact_and_of_every_dtype() -> None:
    tensors = [
        torch.randn(3, 4).t(),
        torch.randint(9, (2,)),
        torch.randn((), dtype=torch.float64),
        torch.randn(5),
        torch.empty(0, 3),
        torch.randn(2, dtype=torch.complex64).conj(),
        torch.ones(1, 4).expand(3, 4),
        torch.tensor([True, False]),
        torch.eye(3).to_sparse(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(4, 4)[:, ::2],
    ]
    rows = fused_copies(tensors, [CPU, CPU])
    addresses = [[t.data_ptr() for t in row if not t.is_sparse and t.numel()] for row in rows]
    for copies in rows:
        for tensor, got in zip(tensors, copies, strict=True):
            assert got.dtype == tensor.dtype
            assert got.is_sparse == tensor.is_sparse
            assert torch.equal(got.to_dense(), tensor.to_dense())
            assert not got.numel() or got.is_sparse or got.data_ptr() != tensor.data_ptr()
        copies[3].add_(1)
        assert (copies[0]._version, copies[3]._version) == (0, 1)
    assert not set(addresses[0]) & set(addresses[1])


def test_copies_lie_in_memory_as_what_they_copy() -> None:
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    [[turned, pictures, gapless]] = fused_copies(
        [torch.randn(3, 4).t(), images, torch.randn(4, 4)[:, ::2]], [CPU]
    )
    assert turned.stride() == (1, 4)
    assert pictures.is_contiguous(memory_format=torch.channels_last)
    assert gapless.is_contiguous()


def test_a_tensor_made_of_others_is_copied_by_itself() -> None:
    both = TwoTensor(torch.ones(3), torch.zeros(3))
    [[plain, copied]] = fused_copies([torch.ones(2), both], [CPU])
    assert type(plain) is Tensor
    assert type(copied) is TwoTensor
    assert copied.a.tolist() == [1.0, 1.0, 1.0]
    assert copied.a.data_ptr() != both.a.data_ptr()
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(both)]
    assert _buckets(params, True) == [[0], [1]]


class _Transfers(TorchDispatchMode):
    """Counts copies to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_there_is_one_transfer_for_each_device_and_dtype() -> None:
    tensors = [torch.ones(n, dtype=t) for n in range(5) for t in (torch.float32, torch.int64)]
    with _Transfers() as transfers:
        fused_copies(tensors, [META, META, META])
    assert transfers.count == 6


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8), st.sampled_from([2, 4, 8]))
def test_packed_tensors_are_aligned(sizes: list[int], itemsize: int) -> None:
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    packing = Packing.of([Layout.of(tensor) for tensor in tensors], dtype)
    ends = [0, *(o + n for o, n in zip(packing.offsets, sizes, strict=True))]
    for offset, end in zip(packing.offsets, ends, strict=False):
        assert offset * itemsize % ALIGN_BYTES == 0
        assert end <= offset < end + ALIGN_BYTES
    assert packing.numel == ends[-1]
    for got, want in zip(packing.unpack(packing.pack(tensors)), tensors, strict=True):
        assert torch.equal(got, want)


def test_copies_are_made_anew_only_when_a_parameter_changed() -> None:
    def on_second(module: nn.Module) -> Tensor:
        return replicator.replicate(module, [CPU, META])[1].weight

    module, replicator = nn.Linear(3, 2), Replicator()
    with torch.inference_mode():
        kept = on_second(module)
    assert kept.device.type == "meta"
    assert kept.requires_grad
    assert not kept.is_inference(), "it serves later training steps too"
    with torch.no_grad():
        assert on_second(module) is kept
        module.weight.add_(1)
    changed = on_second(module)
    assert changed is not kept
    assert on_second(module) is changed
    changed.detach().add_(1)
    pristine = on_second(module)
    assert pristine is not changed, "what a forward writes to a copy is lost"
    pristine.mul_(2)
    again = on_second(module)
    assert "Fan" in type(again.grad_fn).__name__
    replicator.forget()
    assert on_second(module) is not again


# --- gradients of whole models --------------------------------------------------------------------


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("devices", [TWO, THREE], ids=len)
@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_the_pieces_one_by_one(name: str, devices: list[str]) -> None:
    assert_bits_of_pieces(name, devices)


@pytest.mark.usefixtures("copies")
def test_training_follows_the_parameters() -> None:
    model, plain = ConvNet().eval(), ConvNet().eval()
    plain.load_state_dict(model.state_dict())
    ours = fastddp.DataParallel(model, THREE)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, model)]
    for step in range(4):
        (x,) = CASES["cnn"].whole_batch(2, step)
        for m, optimizer in zip((plain, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(m(x)).backward()
            optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


@pytest.mark.usefixtures("copies")
def test_gradients_are_laid_out_as_their_parameters_in_the_memory_of_their_bucket() -> None:
    model = ConvNet().to(memory_format=torch.channels_last)
    fastddp.DataParallel(model, TWO)(torch.randn(4, 3, 8, 8)).sum().backward()
    for param in model.parameters():
        assert param.grad.stride() == param.stride()
    memory = {param.grad.untyped_storage().data_ptr() for param in model.parameters()}
    assert len(memory) == len(_buckets(list(model.parameters()), True)) < 10
    versions = [param.grad._version for param in model.parameters()]
    model.head.bias.grad.mul_(2)
    assert [param.grad._version for param in model.parameters()][:-1] == versions[:-1]


@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("used_from", [0, 2], ids=["by both", "by the second"])
def test_a_sparse_gradient_among_dense_ones(used_from: int) -> None:
    def forward(module: Call, x: Tensor) -> Tensor:
        looked_up = module.net[0](x) if x[0] >= used_from else torch.zeros(len(x), 3)
        return module.net[1](looked_up)

    plain = nn.ModuleList([nn.Embedding(10, 3, sparse=True), nn.Linear(3, 2)])
    model = fastddp.DataParallel(Call(forward, net=plain), TWO)
    rows = torch.tensor([1, 1, 2, 9])
    model(rows).sum().backward()
    sparse, weight, bias = (param.grad.clone() for param in plain.parameters())
    plain.zero_grad()
    plain[1](torch.zeros(used_from, 3)).sum().backward()
    plain[1](plain[0](rows[used_from:])).sum().backward()
    assert sparse.is_sparse
    assert torch.equal(sparse.to_dense(), plain[0].weight.grad.to_dense())
    torch.testing.assert_close(weight, plain[1].weight.grad)
    assert torch.equal(bias, plain[1].bias.grad)


class Pair(nn.Module):
    """Two parameters of one bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scale(), Scale()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) ** 2 * self.second(x)


@pytest.mark.usefixtures("copies")
def test_second_derivatives_go_through() -> None:
    model = fastddp.DataParallel(Pair(), TWO)
    x = torch.arange(1.0, 5.0)
    params = list(model.parameters())
    first = torch.autograd.grad(model(x).sum(), params, create_graph=True)
    assert [g.item() for g in first] == [2 * (x**3).sum().item(), (x**3).sum().item()]
    (second,) = torch.autograd.grad(first[0], params[0])
    assert second.item() == 2 * (x**3).sum().item()


@pytest.mark.usefixtures("copies")
def test_gradients_of_one_parameter_and_of_a_batch_of_outputs() -> None:
    model = fastddp.DataParallel(Pair(), TWO)
    x = torch.arange(1.0, 5.0)
    first, second = model.parameters()
    (only,) = torch.autograd.grad(model(x).sum(), second)
    assert only.item() == (x**3).sum().item()
    each = torch.autograd.grad(model(x), [first, second], torch.eye(4), is_grads_batched=True)
    assert each[0].flatten().tolist() == (2 * x**3).tolist()
    assert each[1].flatten().tolist() == (x**3).tolist()
    assert first.grad is second.grad is None


@pytest.mark.usefixtures("copies")
def test_a_retained_graph_runs_twice_and_two_forwards_share_one_backward() -> None:
    model = fastddp.DataParallel(Pair(), THREE)
    x = torch.arange(1.0, 7.0)
    cubes = (x**3).sum().item()
    loss = model(x).sum() + 2 * model(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert model.module.second.weight.grad.item() == 2 * 3 * cubes


@pytest.mark.usefixtures("copies")
def test_hooks_of_parameters_see_the_sum_once() -> None:
    model = fastddp.DataParallel(Pair(), THREE)
    seen: list[float] = []
    model.module.second.weight.register_hook(lambda grad: seen.append(grad.item()))
    model.module.second.weight.register_post_accumulate_grad_hook(
        lambda param: seen.append(param.grad.item())
    )
    model(torch.arange(1.0, 7.0)).sum().backward()
    assert seen == [441.0, 441.0]


@pytest.mark.usefixtures("copies")
def test_requires_grad_may_be_switched_and_what_no_replica_used_has_no_gradient() -> None:
    unused = nn.Linear(2, 2)
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = fastddp.DataParallel(
        Call(lambda module, x: module.net(x), net=inner, unused=unused), TWO
    )
    for flag in (True, False, True):
        inner[0].requires_grad_(flag)
        model.zero_grad()
        model(torch.ones(4, 2)).sum().backward()
        assert [p.grad is not None for p in inner.parameters()] == [flag, flag, True, True]
        assert unused.weight.grad is unused.bias.grad is None


@pytest.mark.usefixtures("copies")
def test_a_forward_may_write_to_its_copies() -> None:
    def forward(module: Call, x: Tensor) -> Tensor:
        if x[0] > 1:
            with torch.no_grad():
                module.net.first.weight.mul_(3)
        return module.net(x)

    model = fastddp.DataParallel(Call(forward, net=Pair()), TWO)
    x = torch.arange(1.0, 5.0)
    for _ in range(2):
        assert model(x).tolist() == [1, 8, 9 * 27, 9 * 64]


# --- a bucket against its parameters one by one ---------------------------------------------------


def test_parameters_of_one_dtype_share_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "_BUCKET_BYTES", 32)
    params = [
        *(nn.Parameter(torch.ones(4)) for _ in range(3)),
        nn.Parameter(torch.ones(4), requires_grad=False),
        nn.Parameter(torch.ones(2, dtype=torch.complex64)),
        nn.Parameter(torch.ones(4, dtype=torch.float64)),
    ]
    assert _buckets(params, True) == [[5], [2, 1], [0], [3], [4]]
    assert _buckets(params, False) == [[index] for index in range(6)]


LAYOUTS = {
    "rows": lambda n: torch.randn(n, 3),
    "turned": lambda n: torch.randn(3, n).t(),
    "gaps": lambda n: torch.randn(n, 6)[:, ::2],
    "expanded": lambda n: torch.randn(1, 3).expand(n, 3),
    "images": lambda n: torch.randn(2, n, 3, 3).to(memory_format=torch.channels_last),
    "points": lambda n: torch.randn(n),
}


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 5)), min_size=1, max_size=6
    ),
    st.integers(2, 4),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.randoms(use_true_random=False),
)
def test_a_bucket_gives_the_bits_of_its_parameters_one_by_one(
    kinds: list[tuple[str, int]], replicas: int, dtype: torch.dtype, chance: Any
) -> None:
    """Also with any gradients missing, signed zeros, infinities, and gradients laid out oddly."""
    torch.manual_seed(chance.randrange(2**31))

    def values(kind: str, size: int) -> Tensor:
        tensor = LAYOUTS[kind](size).to(dtype)
        special = torch.tensor([0.0, -0.0, torch.inf, 1.0], dtype=dtype)
        picks = torch.randint(5, tensor.shape)
        mixed = torch.where(picks < 4, special[picks.clamp(max=3)], tensor)
        return torch.empty_like(tensor).copy_(mixed) if kind != "expanded" else tensor

    params = [values(*kind).detach().requires_grad_() for kind in kinds]
    rows = [params, *([p.detach().clone() for p in params] for _ in range(replicas - 1))]
    grads = [
        [values(*kind) if chance.random() < 0.7 else None for kind in kinds]
        for _ in range(replicas)
    ]

    def fanned(bucket: list[int]) -> list[Tensor | None]:
        own = [[row[index] for index in bucket] for row in rows]
        outputs = Fan.apply(own, *own[0])
        due = [grads[nth][index] for nth in range(replicas) for index in bucket]
        pairs = [(o, g) for o, g in zip(outputs, due, strict=True) if g is not None]
        if not pairs:
            return [None for _ in bucket]
        return list(
            torch.autograd.grad(
                [o for o, _ in pairs],
                [params[index] for index in bucket],
                [g for _, g in pairs],
                allow_unused=True,
            )
        )

    together = fanned(list(range(len(params))))
    alone = [total for index in range(len(params)) for total in fanned([index])]
    for index, (got, want) in enumerate(zip(together, alone, strict=True)):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(torch.signbit(got)[got == 0], torch.signbit(want)[want == 0])
            if len(params) > 1 and any(row[index] is not None for row in grads[1:]):
                assert got.stride() == Layout.of(params[index]).strides


def test_gradients_of_copies_reach_the_parameter_in_replica_order() -> None:
    # In float32 only this order gives 1: 1e8 swallows what is added to it.
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))]
    rows = [params, *([p.detach().clone() for p in params] for _ in range(3))]
    outputs = Fan.apply(rows, *params)
    assert outputs[0].data_ptr() == params[0].data_ptr() != outputs[2].data_ptr()
    factors = [1e8, 3.0, -1e8, 1.0]
    pairs = zip(factors, outputs[::2], outputs[1::2], strict=True)
    sum(factor * (a.sum() + b.sum()) for factor, a, b in pairs).backward()
    assert [param.grad.unique().tolist() for param in params] == [[1.0], [1.0]]


def test_another_device_packs_behind_the_fans_stream_and_keeps_what_it_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That this order is the right one is shown in `tests/streams`; sparse gradients are not."""
    said: list[str] = []

    def stream(device: torch.device) -> Any:
        return SimpleNamespace(
            name=str(device), wait_stream=lambda other: said.append(f"{device} after {other.name}")
        )

    @contextlib.contextmanager
    def device_index(index: int) -> Iterator[None]:
        said.append(f"device {index}")
        yield
        said.append("device before")

    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    dense, sparse = torch.ones(2), torch.eye(2).to_sparse()
    monkeypatch.setattr(torch.accelerator, "current_stream", stream)
    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(Tensor, "device", second)
    monkeypatch.setattr(
        Tensor,
        "record_stream",
        lambda memory, stream: said.append(f"{memory.dtype} kept for {stream.name}"),
    )
    with _behind(first, [dense, sparse]):
        said.append("packed")
    assert said == [
        *("device 1", "cuda:1 after cuda:0", "packed", "torch.float32 kept for cuda:1"),
        *("torch.int64 kept for cuda:1", "torch.float32 kept for cuda:1", "device before"),
    ]
    said.clear()
    with _behind(second, [dense]):
        said.append("packed")
    assert said == ["packed"], "autograd has made that stream wait"

"""Parameters, buffers and gradients of any strides, and buffers of any dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import fastddp
from tests.conftest import flattening
from tests.parity.checks import small_cap_mb
from tests.ranks import run_ranks

TRANSPORTS = {"shm": None, "gloo": "0"}

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
    *(torch.complex64, torch.complex128),
)

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "slice": lambda t: t[::2],
    "columns": lambda t: t.view(6, 4)[:, 1:3],
    "transposed": lambda t: t.view(6, 4).t(),
    "expanded": lambda t: t[:1].expand(5),
    "expanded columns": lambda t: t[:4].view(4, 1).expand(4, 3),
    "windows": lambda t: t.unfold(0, 4, 2),
    "empty": lambda t: t[:0].view(0, 3),
    "without dimensions": lambda t: t[3],
}


def values(rank: int, dtype: torch.dtype = torch.float32, numel: int = 24) -> Tensor:
    """Numbers that differ by place and rank, in every dtype."""
    numbers = torch.arange(numel) * 3 + 100 * rank
    if dtype == torch.bool:
        return (numbers // 3 + rank) % 2 == 0
    if dtype.itemsize == 1:
        return (numbers % 100 + rank).to(torch.uint8).view(dtype)
    return (numbers + 1j * (numbers + 1) if dtype.is_complex else numbers % 1000).to(dtype)


def as_bytes(tensor: Tensor) -> bytes:
    """The values' bytes, row after row, of any strides and dtype."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if not plain.is_complex():
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        plain = plain.view(integers[plain.element_size()])
    return bytes(plain.contiguous().view(-1).view(torch.uint8).numpy())


def buffers(rank: int) -> Iterator[tuple[str, Tensor]]:
    for dtype in DTYPES:
        for name, view in VIEWS.items():
            yield f"{name} of {dtype}".replace(".", "_"), view(values(rank, dtype))
    base = values(rank)
    yield "overlaps the next", base[:8]
    yield "overlaps the last", base[4:12]
    yield "same elements", base[4:12]
    yield "conjugated", values(rank, torch.complex64).conj()
    yield "negated", values(rank, torch.complex64).conj().imag
    yield "no values", torch.empty(3, device="meta")
    # Other strides on each rank: what counts are the rows.
    square = values(rank, numel=9).view(3, 3)
    yield "as the rank likes", square.t().contiguous().t() if rank else square


class Holder(nn.Module):
    """Has all of these buffers."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        for name, buffer in buffers(rank):
            self.register_buffer(name, buffer)

    def forward(self, x: float) -> Tensor:
        return self.weight.sum() * x


def assert_buffers(model: nn.Module, rank: int, what: str) -> None:
    """Check that the model has the buffers that this rank has built."""
    for name, want in buffers(rank):
        got = model.get_buffer(name)
        assert got.is_meta == want.is_meta, name
        if not got.is_meta:
            assert as_bytes(got) == as_bytes(want), f"{what}: {name}: got {got}"


def _buffers(rank: int, world_size: int, engine: str) -> None:
    model = Holder(rank)
    pointers = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    ours = fastddp.wrap(model, engine=engine)
    assert_buffers(model, 0, "at the start")
    assert {n: b.data_ptr() for n, b in model.named_buffers()} == pointers, "written in place"
    ours(1.0).backward()

    for name, buffer in buffers(rank + 5):  # replaced, as modules do by assignment
        setattr(model, name, buffer)
    ours(1.0).backward()
    assert_buffers(model, 5, "replaced")

    for name, buffer in buffers(rank + 7):  # written in place, where torch can
        own = model.get_buffer(name)
        if buffer.dtype == torch.float32 and not name.startswith(("expanded", "overlaps")):
            own.copy_(buffer)
    ours(1.0).backward()
    for name, want in buffers(7):
        overlaps = name.startswith(("expanded", "overlaps", "same"))
        if want.dtype == torch.float32 and not overlaps and not want.is_meta:
            assert as_bytes(model.get_buffer(name)) == as_bytes(want), f"in place: {name}"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_buffers_of_any_strides_and_dtype(transport: str, engine: str) -> None:
    run_ranks(_buffers, 2, engine, env={"FASTDDP_SHM": TRANSPORTS[transport]})


# --- parameters and gradients ---------------------------------------------------------------------


def parameters(rank: int) -> Iterator[tuple[str, Tensor]]:
    for name, view in VIEWS.items():
        yield name, view(values(rank))
    base = values(rank)
    yield "overlaps the next", base[:8]
    yield "overlaps the last", base[4:12]
    yield "conjugated", values(rank, torch.complex64).conj()
    yield "complex slice", values(rank, torch.complex64)[1::3]
    yield "negated", values(rank, torch.complex64).conj().imag
    yield "channels last", values(rank).view(1, 2, 3, 4).to(memory_format=torch.channels_last)


class Weighted(nn.Module):
    """The gradient of each element is a number that is known: its place, times a factor."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        for name, tensor in parameters(rank):
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(
        self, factor: float, backwards: bool = False, only: list[str] | None = None
    ) -> Tensor:
        """With `backwards`, gradients come with other strides than the parameters have."""
        total = torch.zeros(())
        for name, param in self.named_parameters():
            if only is not None and name not in only:
                continue
            weight = place(param) * factor
            if backwards and param.dim() > 1:
                weight, param = weight.transpose(0, -1).contiguous(), param.transpose(0, -1)
            total = total + _real(param * weight).sum()
        return total


def place(param: Tensor) -> Tensor:
    return torch.arange(param.numel(), dtype=torch.float32).view(param.shape)


def _real(tensor: Tensor) -> Tensor:
    return tensor.real if tensor.is_complex() else tensor


def assert_gradients(model: nn.Module, factor: float, what: str) -> None:
    for name, param in model.named_parameters():
        assert param.grad is not None, f"{what}: {name}"
        assert param.grad.shape == param.shape
        want = (place(param) * factor).to(param.dtype)
        assert torch.equal(param.grad, want), f"{what}: {name}: got {param.grad}, want {want}"


def _gradients(rank: int, world_size: int, engine: str) -> None:
    model = Weighted(rank)
    cap = small_cap_mb(model)
    ours = fastddp.wrap(model, engine=engine, bucket_cap_mb=cap)
    for name, want in parameters(0):
        assert as_bytes(model.get_parameter(name)) == as_bytes(want), f"at the start: {name}"
    for step in range(3):
        ours.zero_grad()
        ours(2.0 * rank).backward()
        assert_gradients(model, 1.0, f"step {step}")
        ours.zero_grad()
        ours(2.0 * rank, backwards=rank == 1).backward()
        assert_gradients(model, 1.0, f"step {step}, other strides on each rank")
    ours.zero_grad()
    with ours.no_sync():
        ours(4.0 * rank, backwards=rank == 0).backward()
    assert_gradients(model, 4.0 * rank, "on this rank")
    ours(2.0 * rank).backward()
    assert_gradients(model, 3.0, "accumulated")
    # Gradients of the script's own making, whose elements may share memory or lie apart, on a rank
    # whose backward brings none.
    ours.zero_grad()
    if rank == 0:
        for param in model.parameters():
            param.grad = torch.full((), 2.0, dtype=param.dtype).expand(param.shape)
        model.get_parameter("slice").grad = torch.full((24,), 2.0)[::2]
        model.get_parameter("channels last").grad = None
    ours(0.0, only=["channels last"] if rank == 0 else None).backward()
    for name, param in model.named_parameters():
        if name != "channels last":
            assert torch.equal(param.grad, torch.ones_like(param)), f"given: {name}: {param.grad}"
    ours.register_comm_hook(None, _mean)
    ours.zero_grad()
    ours(2.0 * rank, backwards=rank == 0).backward()
    assert_gradients(model, 1.0, "through a hook")

    model = Weighted(rank)
    delayed = [(name, p) for name, p in model.named_parameters() if name != "plain"]
    ours = fastddp.wrap(
        model,
        engine=engine,
        delay_all_reduce_named_params=delayed,
        param_to_hook_all_reduce=model.get_parameter("plain"),
    )
    for step in range(2):
        ours.zero_grad()
        ours(2.0 * rank, backwards=rank == step).backward()
        assert_gradients(model, 1.0, f"delayed, step {step}")
    ours.zero_grad()
    for _, param in delayed:
        param.grad = torch.full((), 2.0 * rank, dtype=param.dtype).expand(param.shape)
    ours(2.0 * rank, only=["plain"]).backward()
    for name, param in delayed:
        assert torch.equal(param.grad, torch.ones_like(param)), f"delayed, given: {name}"


def _cast_or_in_one_pass(rank: int, world_size: int, engine: str) -> None:
    """As a model on a GPU, or with `comm_dtype`, has its buckets filled."""
    one_pass = flattening if engine == "native" else contextlib.nullcontext
    for options in ({}, {"comm_dtype": torch.bfloat16}):
        with one_pass():
            model = Weighted(rank)
            ours = fastddp.wrap(model, engine=engine, bucket_cap_mb=small_cap_mb(model), **options)
            for step in range(2):
                ours.zero_grad()
                ours(2.0 * rank, backwards=rank == step).backward()
                assert_gradients(model, 1.0, f"step {step}, {options}")


def test_gradients_of_any_strides_that_are_cast_or_copied_in_one_pass(engine: str) -> None:
    run_ranks(_cast_or_in_one_pass, 2, engine)


def _mean(_: object, bucket: Any) -> Any:
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_parameters_and_gradients_of_any_strides(transport: str, engine: str) -> None:
    run_ranks(_gradients, 2, engine, env={"FASTDDP_SHM": TRANSPORTS[transport]})


# --- what has no strides --------------------------------------------------------------------------

WITHOUT: dict[str, Callable[[], Tensor]] = {
    "torch.sparse_coo": lambda: torch.eye(3).to_sparse(),
    "torch.sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
}


@pytest.mark.filterwarnings("ignore")
def _without_strides(rank: int, world_size: int) -> None:
    for what, make in WITHOUT.items():
        for ranks in ((0,), (1,), (0, 1)):
            model = nn.Linear(2, 2)
            model.register_buffer("odd", make() if rank in ranks else torch.eye(3))
            own = ValueError if rank in ranks else fastddp.MismatchError
            with pytest.raises(own, match=f"'odd'.*{what}.*_ddp_params_and_buffers_to_ignore"):
                fastddp.wrap(model)
        model = nn.Linear(2, 2)
        model.register_buffer("odd", make())
        model._ddp_params_and_buffers_to_ignore = ["odd"]
        fastddp.wrap(model)(torch.ones(1, 2)).sum().backward()
        model._ddp_params_and_buffers_to_ignore = []
        plain = nn.Linear(2, 2)
        plain.register_buffer("odd", torch.eye(3))
        ours = fastddp.wrap(plain)
        plain.odd = make()
        with pytest.raises(ValueError, match=f"'odd'.*{what}"):
            ours(torch.ones(1, 2))
        fastddp.wrap(model, broadcast_buffers=False)(torch.ones(1, 2)).sum().backward()


def test_a_buffer_that_cannot_be_sent_is_named_on_every_rank() -> None:
    run_ranks(_without_strides, 2)

"""`flatten` and `unflatten`: torch's arithmetic, whatever the sizes, dtypes and addresses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastddp
from fastddp.device import flat as flat_module
from tests.conftest import require_native
from tests.unit.test_kernels import assert_same_bits, random_bits

SMALL = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(a, b) for a in SMALL for b in SMALL] + [(torch.float64, torch.float64)]
scales = st.one_of(st.integers(1, 64).map(lambda world: 1.0 / world), st.floats(0.001, 1000))
sizes = st.lists(
    st.one_of(st.integers(0, 40), st.sampled_from([1023, 4096, 4097, 20000])),
    min_size=1,
    max_size=12,
)


def expected(tensor: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    wide = tensor if dtype == tensor.dtype or tensor.dtype == torch.float32 else tensor.float()
    return (wide * scale).to(dtype)


@given(st.sampled_from(PAIRS), sizes, st.integers(0, 2**30), scales, st.integers(0, 3))
def test_both_ways_are_torchs_mul(pair, numels, seed, scale, shift):
    """`shift` makes addresses odd."""
    own, kind = pair
    tensors = [random_bits(own, n + shift, seed + i)[shift:] for i, n in enumerate(numels)]
    out = torch.full((sum(numels) + shift,), 7, dtype=kind)[shift:]
    fastddp.flatten(tensors, out=out, scale=scale)
    want = torch.cat([expected(tensor, kind, scale) for tensor in tensors])
    assert_same_bits(out, want)

    back = [torch.full((n + shift,), 7, dtype=own)[shift:] for n in numels]
    fastddp.unflatten(out, back, scale=scale)
    for got, piece in zip(back, out.split(numels), strict=True):
        assert_same_bits(got, expected(piece, own, scale))


@given(st.sampled_from(PAIRS), sizes, st.integers(0, 2**30))
def test_moments(pair, numels, seed):
    own, kind = pair
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=generator).to(own) for n in numels]
    moments = torch.full((2,), 7.0, dtype=torch.float64)
    out = fastddp.flatten(tensors, dtype=kind, scale=0.5, moments=moments)
    exact = math.fsum(value * value for value in out.double().tolist())
    assert moments[0].item() == pytest.approx(exact, rel=1e-5)
    assert moments[1].item() == 1.0
    again = torch.empty(2, dtype=torch.float64)
    fastddp.flatten(tensors, dtype=kind, scale=0.5, moments=again)
    assert torch.equal(again, moments)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 4096, 9999])
def test_one_value_that_is_not_finite_is_seen(bad, at):
    tensor = torch.ones(10000)
    tensor[at] = bad
    moments = torch.empty(2, dtype=torch.float64)
    fastddp.flatten([torch.ones(3), tensor], moments=moments)
    assert moments[1].item() == 0.0


def test_what_overflows_in_the_cast_is_not_finite():
    moments = torch.empty(2, dtype=torch.float64)
    fastddp.flatten([torch.tensor([70000.0])], dtype=torch.float16, moments=moments)
    assert moments[1].item() == 0.0


def test_the_python_way_gives_the_same_bits(monkeypatch):
    require_native()
    tensors = [torch.randn(n) for n in (5, 1000, 0, 7)]
    fast = fastddp.flatten(tensors, dtype=torch.bfloat16, scale=1 / 3)
    monkeypatch.setattr(flat_module, "_native", lambda _: None)
    moments = torch.empty(2, dtype=torch.float64)
    plain = fastddp.flatten(tensors, dtype=torch.bfloat16, scale=1 / 3, moments=moments)
    assert_same_bits(fast, plain)
    assert moments.tolist() == [pytest.approx(plain.double().square().sum().item()), 1.0]


def test_gaps_are_zero_in_a_new_buffer_and_left_alone_in_another():
    tensors = [torch.ones(3), torch.full((2,), 2.0)]
    assert fastddp.flatten(tensors, offsets=[4, 0]).tolist() == [2, 2, 0, 0, 1, 1, 1]
    out = torch.full((8,), 9.0)
    fastddp.flatten(tensors, out=out, offsets=[4, 0])
    assert out.tolist() == [2, 2, 9, 9, 1, 1, 1, 9]


def test_any_layout_is_read_and_written_by_rows():
    matrix = torch.arange(6.0).view(2, 3)
    assert fastddp.flatten([matrix.t()]).tolist() == [0, 3, 1, 4, 2, 5]
    target = torch.zeros(2, 3)
    fastddp.unflatten(torch.arange(6.0), [target.t()])
    assert target.tolist() == [[0, 2, 4], [1, 3, 5]]


def test_a_sign_that_is_only_a_bit_is_read_and_written():
    lazy = torch.view_as_complex(torch.tensor([[0.0, 1.0]])).conj().imag
    assert lazy.is_neg()
    assert fastddp.flatten([lazy]).tolist() == [-1]
    target = torch.zeros(3)
    fastddp.unflatten(torch.ones(3), [torch._neg_view(target)])
    assert target.tolist() == [-1, -1, -1]


def test_autograd_sees_the_writes():
    weight = torch.ones(3, requires_grad=True)
    target = torch.ones(3)
    product = weight * target
    fastddp.unflatten(torch.zeros(3), [target])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "at least one tensor", lambda: fastddp.flatten([])),
        (TypeError, "got torch.int64", lambda: fastddp.flatten([torch.ones(2).long()])),
        (
            TypeError,
            "float64 only goes with float64",
            lambda: fastddp.flatten([torch.ones(2).double()], dtype=torch.float32),
        ),
        (
            ValueError,
            "tensor 1 is torch.float16 on cpu, expected torch.float32",
            lambda: fastddp.flatten([torch.ones(2), torch.ones(2).half()]),
        ),
        (
            ValueError,
            "elements 0 to 4 of a flat buffer that has 3",
            lambda: fastddp.flatten([torch.ones(4)], out=torch.ones(3)),
        ),
        (
            ValueError,
            "overlap at element 1",
            lambda: fastddp.flatten([torch.ones(2), torch.ones(2)], offsets=[0, 1]),
        ),
        (
            ValueError,
            "2 tensors, but 1 offsets",
            lambda: fastddp.flatten([torch.ones(2), torch.ones(2)], offsets=[0]),
        ),
        (
            ValueError,
            "one dimension and be contiguous",
            lambda: fastddp.flatten([torch.ones(2)], out=torch.ones(4)[::2]),
        ),
        (
            ValueError,
            "moments must be 2 float64 elements on cpu",
            lambda: fastddp.flatten([torch.ones(2)], moments=torch.ones(2)),
        ),
        (
            ValueError,
            r"one after the other, got .* strides \(2,\)",
            lambda: fastddp.flatten([torch.ones(2)], moments=torch.ones(4).double()[::2]),
        ),
        (
            ValueError,
            "the buffer given as out is torch.float32",
            lambda: fastddp.flatten([torch.ones(2)], out=torch.ones(2), dtype=torch.float16),
        ),
    ],
)
def test_what_does_not_fit_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()

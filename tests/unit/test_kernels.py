"""The C++ kernels give torch's bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddp import extension

pytestmark = pytest.mark.skipif(extension.load() is None, reason="needs the compiled extension")

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
dtypes = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
scales = st.one_of(st.integers(1, 64).map(lambda world: 1.0 / world), st.floats(0.001, 1000))


def random_bits(dtype: torch.dtype, numel: int, seed: int) -> torch.Tensor:
    """Returns any bit patterns but NaN's: subnormals, infinities and edges of every exponent."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1) - 1
    integer = INTEGERS.get(dtype, torch.int16)
    bits = torch.randint(low, high, (numel,), generator=generator, dtype=integer)
    return bits.view(dtype).nan_to_num(nan=1.0, posinf=float("inf"), neginf=float("-inf"))


@given(dtypes, st.integers(0, 3000), st.integers(0, 2**30), scales)
def test_scale_copy_is_torchs_mul(dtype, numel, seed, scale):
    from fastddp import _C

    src = random_bits(dtype, numel, seed)
    dst = torch.full_like(src, 7)
    _C.scale_copy(dst, src, scale)
    assert_same_bits(dst, src.mul(scale))


@given(dtypes, st.integers(0, 3000), st.integers(0, 2**30), scales)
def test_scale_add_is_torchs_mul_then_add(dtype, numel, seed, scale):
    from fastddp import _C

    src, dst = random_bits(dtype, numel, seed), random_bits(dtype, numel, seed + 1)
    expected = dst + src.mul(scale)
    _C.scale_add(dst, src, scale)
    assert_same_bits(dst, expected)


def test_what_does_not_fit_is_refused():
    from fastddp import _C

    with pytest.raises(ValueError, match="one shape"):
        _C.scale_copy(torch.zeros(2), torch.zeros(3), 1.0)
    with pytest.raises(TypeError, match="floating point"):
        _C.scale_copy(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 1.0)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    integer = INTEGERS.get(actual.dtype, torch.int16)
    same = actual.view(integer) == expected.view(integer)
    both_nan = actual.isnan() & expected.isnan()  # inf - inf; a NaN's payload is nobody's business
    assert (same | both_nan).all(), f"first at {int((~(same | both_nan)).nonzero()[0])}"

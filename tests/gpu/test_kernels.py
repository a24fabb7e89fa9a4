"""`flatten` and `unflatten` on a GPU: the bits of the CPU, in one launch, without a wait."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import fastddp
from fastddp import extension
from tests.gpu.common import DEVICE, ONE_GPU, delay, device_events, is_kernel

pytestmark = ONE_GPU

HALF = (torch.float16, torch.bfloat16, torch.float32)
PAIRS = [*itertools.product(HALF, HALF), (torch.float64, torch.float64)]
IDS = [f"{a}-{b}".replace("torch.", "") for a, b in PAIRS]
SIZES = (1, 0, 3, 4, 7, 8, 1023, 4096, 70_001, 2_000_003)
SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -3e-42, 65504.0, 3e38)


def values(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """On the CPU: of all magnitudes, with some of the special values."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(numel, generator=generator, dtype=torch.float64)
    drawn *= torch.exp2(torch.randint(-30, 30, (numel,), generator=generator))
    picks = torch.randint(40, (numel,), generator=generator)
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    is_special = picks < len(SPECIAL)
    drawn[is_special] = special[picks[is_special]]
    return drawn.to(dtype)


def shifted(tensor: Tensor, by: int) -> Tensor:
    """On the GPU, beginning `by` elements after an aligned address."""
    memory = torch.zeros(tensor.numel() + by, dtype=tensor.dtype, device=DEVICE)
    return memory[by:].copy_(tensor.flatten()).view(tensor.shape)


def spread(tensors: Sequence[Tensor], gap: int) -> list[int]:
    """Return offsets with gaps of 0, `gap`, 2 `gap`, 0 ... elements."""
    offsets, end = [], 0
    for nth, tensor in enumerate(tensors):
        offsets.append(end + nth % 3 * gap)
        end = offsets[-1] + tensor.numel()
    return offsets


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Compare with signs of zeros; a NaN may have any payload, which processors choose."""
    got = got.cpu()
    assert got.dtype == want.dtype
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    different = (got.view(integer) != want.view(integer)) & ~nan
    assert not different.any(), (
        f"{int(different.sum())} of {want.numel()} differ, the first at {int(different.argmax())}:"
        f" {got[different][0]} and {want[different][0]}"
    )


@pytest.mark.parametrize("shift", [0, 1, 3], ids=lambda n: f"shift{n}")
@pytest.mark.parametrize("gap", [0, 1, 8], ids=lambda n: f"gap{n}")
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=IDS)
def test_flatten_gives_the_bits_of_the_cpu(
    source: torch.dtype, target: torch.dtype, gap: int, shift: int
) -> None:
    tensors = [values(size, source, size) for size in SIZES]
    offsets = spread(tensors, gap)
    end = offsets[-1] + tensors[-1].numel()
    for scale in (1.0, 1 / 3):
        want = torch.full((end + 5,), 7.0, dtype=target)
        got = shifted(want, shift)
        fastddp.flatten(tensors, out=want, scale=scale, offsets=offsets)
        on_gpu = [shifted(tensor, shift) for tensor in tensors]
        assert fastddp.flatten(on_gpu, out=got, scale=scale, offsets=offsets) is got
        assert_same_bits(got, want)  # also of the gaps, which are left alone


@pytest.mark.parametrize("shift", [0, 1, 3], ids=lambda n: f"shift{n}")
@pytest.mark.parametrize(("source", "target"), PAIRS, ids=IDS)
def test_unflatten_gives_the_bits_of_the_cpu(
    source: torch.dtype, target: torch.dtype, shift: int
) -> None:
    want = [torch.zeros(size, dtype=target) for size in SIZES]
    offsets = spread(want, 1)
    flat = values(offsets[-1] + SIZES[-1], source, 1)
    got = [shifted(tensor, shift) for tensor in want]
    fastddp.unflatten(flat, want, scale=1 / 3, offsets=offsets)
    fastddp.unflatten(shifted(flat, shift), got, scale=1 / 3, offsets=offsets)
    for mine, due in zip(got, want, strict=True):
        assert_same_bits(mine, due)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_thousands_of_tiny_tensors(dtype: torch.dtype) -> None:
    tensors = [values(1 + n % 7, torch.float32, n) for n in range(3000)]
    on_gpu = [tensor.to(DEVICE) for tensor in tensors]
    want = fastddp.flatten(tensors, dtype=dtype, scale=0.5)
    got = fastddp.flatten(on_gpu, dtype=dtype, scale=0.5)
    assert_same_bits(got, want)
    back = [torch.zeros_like(tensor) for tensor in on_gpu]
    fastddp.unflatten(got, back, scale=2.0)
    fastddp.unflatten(want, tensors, scale=2.0)
    assert_same_bits(torch.cat(back), torch.cat(tensors))


def test_tensors_of_other_layouts_go_by_rows() -> None:
    images = values(2 * 3 * 8 * 8, torch.float32, 1).view(2, 3, 8, 8)
    tensors = [
        images.to(memory_format=torch.channels_last),
        values(35, torch.float32, 2).view(5, 7).t(),
        values(60, torch.float32, 3).view(5, 12)[:, 1::2],
        values(5, torch.float32, 4).expand(3, 5),
    ]
    want = torch.cat([tensor.reshape(-1) for tensor in tensors])
    on_gpu = [
        torch.empty_strided(t.shape, t.stride(), device=DEVICE).copy_(t)
        if t.stride(0)
        else t.cuda()
        for t in tensors
    ]
    assert_same_bits(fastddp.flatten(on_gpu), want)
    fastddp.unflatten(torch.arange(want.numel(), dtype=torch.float32, device=DEVICE), on_gpu[:3])
    numbers = torch.arange(want.numel(), dtype=torch.float32)
    found = torch.cat([tensor.cpu().reshape(-1) for tensor in on_gpu[:3]])
    assert torch.equal(found, numbers[: found.numel()])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tensors_that_lie_in_the_buffer_already(dtype: torch.dtype) -> None:
    want = values(5000, dtype, 1)
    got = want.to(DEVICE)
    for flat in (want, got):
        pieces = [flat[:1001], flat[1001:1003], flat[1003:4000]]
        fastddp.flatten(pieces, out=flat, scale=1 / 3, offsets=[0, 1001, 1003])
        fastddp.unflatten(flat, pieces, scale=5.0, offsets=[0, 1001, 1003])
    assert_same_bits(got, want)


@pytest.fixture
def has_kernels() -> None:
    native = extension.load()
    if native is None or not getattr(native, "has_cuda", False):
        pytest.skip("the extension was built without CUDA")


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=IDS)
def test_moments_are_those_of_what_was_written(source: torch.dtype, target: torch.dtype) -> None:
    tensors = [torch.randn(size, dtype=source) for size in SIZES]
    on_gpu = [tensor.to(DEVICE) for tensor in tensors]
    results = [torch.full((2,), 9.0, dtype=torch.float64, device=DEVICE) for _ in range(3)]
    for moments in results:
        flat = fastddp.flatten(on_gpu, dtype=target, scale=0.25, moments=moments)
    assert torch.equal(results[0], results[1]), "the same values, so the same bits"
    assert torch.equal(results[0], results[2]), "the same values, so the same bits"
    square_sum, finite = results[0].tolist()
    # The kernel adds up in float32, a few thousand terms at a time.
    assert square_sum == pytest.approx(flat.double().square().sum().item(), rel=1e-4)
    assert finite == 1.0


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 70_000, -1])
def test_moments_see_one_value_that_is_not_finite(bad: float, place: int) -> None:
    tensors = [torch.ones(size, device=DEVICE) for size in (70_001, 3, 2_000_003)]
    moments = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    fastddp.flatten(tensors, moments=moments)
    assert moments.tolist() == [2_070_007.0, 1.0]
    tensors[-1 if place < 0 else 0][place] = bad
    fastddp.flatten(tensors, moments=moments)
    assert moments[1] == 0.0


def test_a_value_that_the_buffer_cannot_hold_is_not_finite() -> None:
    moments = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    big = torch.full((100,), 60_000.0, device=DEVICE)
    fastddp.flatten([big], dtype=torch.float16, moments=moments)
    assert moments[1] == 1.0
    fastddp.flatten([big], dtype=torch.float16, scale=2.0, moments=moments)
    assert moments[1] == 0.0


@pytest.mark.usefixtures("has_kernels")
@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bucket_is_one_launch_and_no_copy_from_the_host(dtype: torch.dtype) -> None:
    tensors = [torch.randn(30_000 + n, device=DEVICE) for n in range(200)]  # 24 MB
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=dtype, device=DEVICE)
    for run in (
        lambda: fastddp.flatten(tensors, out=flat, scale=0.5),
        lambda: fastddp.unflatten(flat, tensors, scale=2.0),
    ):
        run()
        names = [name for name, _, _ in device_events(run)]
        assert len([name for name in names if is_kernel(name)]) == 1, names
        assert not [name for name in names if name.startswith("Memcpy")], names


def test_the_work_is_the_current_streams() -> None:
    source = torch.zeros(1 << 20, device=DEVICE)
    flat, back = torch.zeros_like(source), torch.zeros_like(source)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(DEVICE)
    with torch.cuda.stream(stream):
        delay()
        source.fill_(3.0)
        fastddp.flatten([source], out=flat)
        fastddp.unflatten(flat, [back])
    stream.synchronize()
    assert flat.unique().tolist() == back.unique().tolist() == [3.0]


@pytest.mark.usefixtures("has_kernels", "no_waiting")
def test_the_host_does_not_wait() -> None:
    tensors = [torch.randn(1000, device=DEVICE) for _ in range(3000)]
    moments = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    flat = fastddp.flatten(tensors, moments=moments)
    torch.cuda.set_sync_debug_mode("error")
    fastddp.flatten(tensors, out=flat, moments=moments)
    fastddp.unflatten(flat, tensors)


@pytest.mark.usefixtures("has_kernels")
def test_a_graph_holds_the_tables() -> None:
    tensors = [torch.randn(1 + n % 50, device=DEVICE) for n in range(3000)]
    flat = fastddp.flatten(tensors, scale=0.5)
    moments = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    fastddp.flatten(tensors, out=flat, scale=0.5, moments=moments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastddp.flatten(tensors, out=flat, scale=0.5, moments=moments)
        fastddp.unflatten(flat, tensors, scale=4.0)
    for tensor in tensors:
        tensor.fill_(3.0)
    flat.zero_()
    for factor in (1, 2):
        graph.replay()
        assert flat.unique().tolist() == [1.5 * factor]
        assert moments.tolist() == [flat.numel() * (1.5 * factor) ** 2, 1.0]
        assert torch.cat(tensors).unique().tolist() == [6.0 * factor]

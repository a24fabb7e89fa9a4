"""The passes over a bucket on one device, which are verified, timed and compared.

A *pass* uses several sets of buffers in turn, so that none is still in the device's cache.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.stats import Samples
from benchmarks.common.trials import WrongResultError, turn_order

COPY = "device copy"
FUSED, ONE_BY_ONE = "fastddp.flatten", "copy_ one by one"
WEIGHT, BIAS = 1024 * 768, 1024  # elements, of which buckets are made
CYCLES_PER_S = 2e9  # of a GPU's clock, at most


@dataclass(frozen=True)
class Pass:
    """A function to time, and a check of its result."""

    run: Callable[[], object]
    num_bytes: int
    """The bytes that a call reads and writes."""
    check: Callable[[], str | None]
    """Runs it and returns what is wrong with the result; None if nothing is."""


@dataclass
class Buffers:
    """One set of buffers: the tensors of a bucket, its flat buffers, and another one to copy to."""

    tensors: list[Tensor]
    flat: Tensor
    half: Tensor
    other: Tensor


# Bandwidth ----------------------------------------------------------------------------------------


def bandwidth_passes(device: torch.device, numel: int) -> dict[str, Pass]:
    """Makes passes that flatten and unflatten a bucket of `numel` float32 elements."""
    import fastddp

    sets = [_buffers(device, numel, seed) for seed in range(_num_sets(device, 4 * numel))]
    wide, narrow = 4 * numel, 2 * numel

    def flattened(out: Callable[[Buffers], Tensor]) -> Callable[[], str | None]:
        def check() -> str | None:
            one = sets[0]
            want = torch.cat([t.reshape(-1) for t in one.tensors]).to(out(one).dtype)
            got = fastddp.flatten(one.tensors, out=out(one).zero_())
            return None if torch.equal(got, want) else "a wrong flat buffer"

        return check

    def unflattened(flat: Callable[[Buffers], Tensor]) -> Callable[[], str | None]:
        def check() -> str | None:
            one = sets[0]
            flat(one).copy_(torch.randn(numel, device=device))
            fastddp.unflatten(flat(one), one.tensors)
            got = torch.cat([t.reshape(-1) for t in one.tensors])
            return None if torch.equal(got, flat(one).float()) else "wrong tensors"

        return check

    def copied() -> str | None:
        sets[0].other.copy_(sets[0].flat)
        return None if torch.equal(sets[0].other, sets[0].flat) else "a wrong copy"

    def over(work: Callable[[Buffers], object]) -> Callable[[], object]:
        turn = itertools.cycle(sets)
        return lambda: work(next(turn))

    return {
        COPY: Pass(over(lambda s: s.other.copy_(s.flat)), 2 * wide, copied),
        "flatten float32": Pass(
            over(lambda s: fastddp.flatten(s.tensors, out=s.flat)),
            2 * wide,
            flattened(lambda s: s.flat),
        ),
        "unflatten float32": Pass(
            over(lambda s: fastddp.unflatten(s.flat, s.tensors)),
            2 * wide,
            unflattened(lambda s: s.flat),
        ),
        "flatten to bfloat16": Pass(
            over(lambda s: fastddp.flatten(s.tensors, out=s.half)),
            wide + narrow,
            flattened(lambda s: s.half),
        ),
        "unflatten from bfloat16": Pass(
            over(lambda s: fastddp.unflatten(s.half, s.tensors)),
            wide + narrow,
            unflattened(lambda s: s.half),
        ),
    }


def _buffers(device: torch.device, numel: int, seed: int) -> Buffers:
    generator = torch.Generator(device).manual_seed(seed)
    tensors, left = [], numel
    for size in itertools.cycle((WEIGHT, BIAS)):
        if left == 0:
            break
        tensors.append(torch.randn(min(size, left), generator=generator, device=device))
        left -= tensors[-1].numel()
    return Buffers(
        tensors,
        torch.zeros(numel, device=device),
        torch.zeros(numel, device=device, dtype=torch.bfloat16),
        torch.zeros(numel, device=device),
    )


def _num_sets(device: torch.device, num_bytes: int) -> int:
    """Returns how many sets fill four times the cache, so that none is in it; at least two."""
    if device.type == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // num_bytes))


# Tiny tensors -------------------------------------------------------------------------------------


def tiny_passes(device: torch.device, count: int) -> dict[str, Pass]:
    """Makes passes that copy `count` tensors of 1 to 256 elements into one buffer."""
    import fastddp

    tensors = [torch.randn(1 + 37 * n % 256, device=device) for n in range(count)]
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.zeros(sum(sizes), device=device)
    places = list(flat.split(sizes))
    want = torch.cat(tensors)

    def one_by_one() -> None:
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor)

    def timed(run: Callable[[], object]) -> Pass:
        def check() -> str | None:
            flat.zero_()
            run()
            return None if torch.equal(flat, want) else "a wrong flat buffer"

        return Pass(run, 8 * flat.numel(), check)

    return {
        ONE_BY_ONE: timed(one_by_one),
        "torch._foreach_copy_": timed(lambda: torch._foreach_copy_(places, tensors)),
        "torch.cat": timed(lambda: torch.cat(tensors, out=flat)),
        FUSED: timed(lambda: fastddp.flatten(tensors, out=flat)),
    }


# Timing -------------------------------------------------------------------------------------------


def verify(passes: Mapping[str, Pass]) -> None:
    """Raises an error unless every pass gives the right result."""
    for name, one in passes.items():
        problem = one.check()
        if problem is not None:
            raise WrongResultError(f"{name}: {problem}. No time is reported for a wrong result.")


def device_us(device: torch.device, passes: Mapping[str, Pass], rounds: int, calls: int) -> Samples:
    """Returns the microseconds of the device per call: for each pass one sample per round."""
    samples: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name in turn_order(list(passes), number):
            us = _timed_on_device(device, passes[name].run, calls)
            if number:  # the first round is a warm-up
                samples[name].append(us)
    return samples


def _timed_on_device(device: torch.device, run: Callable[[], object], calls: int) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return 1e6 * (time.perf_counter() - start) / calls
    run()
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    host_s = time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Keeps the device busy until the host has launched all calls. Else the host's time is measured.
    torch.cuda._sleep(int(min(0.5, 2 * calls * host_s) * CYCLES_PER_S))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / calls


def wall_us(
    device: torch.device, passes: Mapping[str, Pass], rounds: int
) -> tuple[Samples, Samples]:
    """Returns the microseconds until the result is complete, and until the call returns."""
    done: dict[str, list[float]] = {name: [] for name in passes}
    returned: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name in turn_order(list(passes), number):
            synchronize(device)
            start = time.perf_counter()
            passes[name].run()
            back = time.perf_counter()
            synchronize(device)
            if number:
                done[name].append(1e6 * (time.perf_counter() - start))
                returned[name].append(1e6 * (back - start))
    return done, returned


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all its work."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)

"""What the parity tests share: exact comparison, and a bound on rounding where order is free."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastddp
from tests.models import Ladder


def small_cap_mb(model: nn.Module) -> float:
    """Return a bucket cap that gives a small model about five buckets."""
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return num_bytes / 5 / 2**20


def wrap_small(model: nn.Module, engine: str) -> fastddp.DistributedDataParallel:
    """Wrap with several buckets, so that their order and the re-planning matter."""
    return fastddp.DistributedDataParallel(model, engine=engine, bucket_cap_mb=small_cap_mb(model))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Copy every parameter's gradient; None where there is none."""
    return {
        name: None if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
    }


def bits(tensor: Tensor | None) -> bytes | None:
    """Return the values' bytes in logical order: unlike `==`, they tell -0.0 and NaNs apart."""
    if tensor is None:
        return None
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def digest(tensors: Mapping[str, Tensor | None]) -> str:
    """Name the exact contents, to compare them across ranks."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(name.encode())
        total.update(b"none" if tensor is None else bits(tensor) or b"")
    return total.hexdigest()


def assert_same_bits(
    got: Mapping[str, Tensor | None], want: Mapping[str, Tensor | None], what: str
) -> None:
    assert got.keys() == want.keys(), what
    different = [name for name in want if bits(got[name]) != bits(want[name])]
    assert not different, (
        f"{what}: {different[0]}: got {got[different[0]]}, want {want[different[0]]}"
    )


def assert_within(
    got: Mapping[str, Tensor | None],
    want: Mapping[str, Tensor | None],
    tolerance: Mapping[str, Tensor],
    what: str,
) -> None:
    """Compare each element with its own tolerance; a missing gradient must miss on both sides."""
    assert got.keys() == want.keys(), what
    for name, wanted in want.items():
        value = got[name]
        assert (value is None) == (wanted is None), f"{what}: {name}: got {value}, want {wanted}"
        if value is None or wanted is None:
            continue
        error = (wide(value) - wide(wanted)).abs()
        excess = error > tolerance[name]
        assert not excess.any(), (
            f"{what}: {name}: off by {error.max():.3g}, at most {tolerance[name].max():.3g}"
        )


def wide(tensor: Tensor) -> Tensor:
    """In double precision, real."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.detach().double()


def rounding_of_average(local: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Bound the difference between two averages of these gradients, whatever the order of sums.

    Either result is a sum of W terms g/W. One rounding for each term's product and W - 1 for the
    additions: |error| <= W * u * sum |g/W| to first order, with u = eps/2. Two results differ by at
    most twice that; the tenth on top covers the higher orders, the constant the subnormal range.
    A collective: every rank passes its own gradients of the same parameters.
    """
    world_size = dist.get_world_size()
    sizes = {name: wide(grad).abs() for name, grad in local.items() if grad is not None}
    total = torch.cat([size.reshape(-1) for size in sizes.values()])
    dist.all_reduce(total)
    pieces = total.split([size.numel() for size in sizes.values()])
    bounds = {}
    for (name, size), piece in zip(sizes.items(), pieces, strict=True):
        info = torch.finfo(local[name].dtype)  # type: ignore[union-attr]
        bound = 1.1 * 2 * world_size * (info.eps / 2) * piece / world_size + 4 * info.tiny
        bounds[name] = bound.view(size.shape)
    return bounds


def assert_ladder(
    model: nn.Module, want: Mapping[str, float | None] | float | None, what: object
) -> None:
    """Check each gradient of a `Ladder`: all elements are `want[name]` times the name's factor.

    None says that there is no gradient. One number is meant for all names.
    """
    for name in Ladder.NAMES:
        wanted = want[name] if isinstance(want, Mapping) else want
        grad = model.get_parameter(name).grad
        if wanted is None:
            assert grad is None, f"{what}: {name}: got {grad}, want none"
            continue
        assert grad is not None, f"{what}: {name}: no gradient, want {wanted * Ladder.factor(name)}"
        values = grad.unique().tolist()
        assert values == [wanted * Ladder.factor(name)], (
            f"{what}: {name}: got {values}, want {wanted} * {Ladder.factor(name)}"
        )

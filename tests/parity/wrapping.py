"""The two ways to wrap a model, and models that cannot be wrapped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.models import Ladder

MAKES = ("DistributedDataParallel", "wrap")


def _meta() -> nn.Module:
    return nn.Linear(2, 2, device="meta")


def _frozen() -> nn.Module:
    return Ladder().requires_grad_(False)


def _two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))


def _integers() -> nn.Module:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine = nn.Parameter(torch.ones(2))
            self.odd = nn.Parameter(torch.ones(2, dtype=torch.float8_e4m3fn))

    return Odd()


def _lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))


UNFIT: dict[str, tuple[Callable[[], nn.Module], type[Exception], list[str]]] = {
    "meta": (_meta, ValueError, ["'weight'", "meta", "to_empty"]),
    "two devices": (_two_devices, ValueError, ["meta", "1.weight"]),
    "frozen": (_frozen, RuntimeError, ["gradient", "Ladder"]),
    "dtype": (_integers, ValueError, ["'odd'", "float8_e4m3fn"]),
    "lazy": (_lazy, RuntimeError, ["'1.weight'", "uninitialized"]),
}

"""Small seeded models and their inputs, one for each thing that data parallelism can get wrong.

A case travels to the ranks by name: `CASES[name].build()` gives the same parameters in every
process, `inputs(rank, step)` that rank's batch. Every rank's batch has the same size and the loss
is a mean over samples, so the mean of the ranks' gradients is the gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH = 4


@dataclass(frozen=True)
class Case:
    """A model, its data and what has to be known to compare it."""

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    has_unused: bool = False
    """Some parameters get no gradient: torch's class must be told to look for them."""
    has_batch_norm: bool = False
    """In training a sample's output depends on the other samples of its batch."""

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20240607)
            model = self.make()
        return model if dtype is None else model.to(dtype)

    def inputs(self, rank: int, step: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1_000 * step + rank + 1)
        tensors = self.make_inputs(generator)
        if dtype is None:
            return tensors
        return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)

    def whole_batch(
        self, world_size: int, step: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """Concatenate what the ranks get."""
        by_rank = [self.inputs(rank, step, dtype) for rank in range(world_size)]
        return tuple(torch.cat(tensors) for tensors in zip(*by_rank, strict=True))


def loss_of(output: Tensor) -> Tensor:
    """Average over samples and whatever else; real also for complex outputs."""
    output = torch.view_as_real(output) if output.is_complex() else output
    return output.square().mean()


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 6, 3, stride=2)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.conv1(x)))
        x = functional.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class TiedTransformer(nn.Module):
    """The embedding is also the output layer: one parameter under two names, two gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 12)
        self.layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)
        self.head = nn.Linear(12, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)))


class MixedDtypes(nn.Module):
    """One layer each of float32, float64 and bfloat16, interleaved in the order of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.second = nn.Linear(7, 5, dtype=torch.float64)
        self.third = nn.Linear(5, 9, dtype=torch.bfloat16)
        self.fourth = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third, self.fourth):
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        return x


class ManyTiny(nn.Module):
    """2,000 parameters of one to three elements."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.ParameterList(torch.randn(1 + i % 3) for i in range(2000))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat(list(self.pieces))


class PartlyFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.last = nn.Linear(6, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


class PartlyUnused(nn.Module):
    """`never` takes part in no forward; `ignored` takes part, but not in what is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.never = nn.Linear(6, 4)
        self.ignored = nn.Linear(6, 2)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        self.ignored(x)
        return self.last(x)


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.shared = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.shared(x)))


class OddShapes(nn.Module):
    """A parameter without dimensions, one without elements, and one that is a transposed view."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.transposed = nn.Parameter(torch.randn(4, 5).t())
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([x @ self.transposed, self.empty.new_zeros(0, 4)])
        return rows * self.scale + self.shift + self.empty.sum()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.real = nn.Linear(3, 4)
        self.mix = nn.Parameter(torch.randn(4, 5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.real(x)).to(self.mix.dtype) @ self.mix


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 1), nn.Tanh(), nn.Linear(1, 5), nn.Linear(5, 3)
    )


def _channels_last() -> nn.Module:
    return ConvNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _rows(width: int) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda generator: (torch.randn(BATCH, width, generator=generator),)


def _images(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, 3, 8, 8, generator=generator),)


def _channels_last_images(generator: torch.Generator) -> tuple[Tensor, ...]:
    (images,) = _images(generator)
    return (images.to(memory_format=torch.channels_last),)


def _tokens(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(17, (BATCH, 6), generator=generator),)


CASES = {
    case.name: case
    for case in (
        Case("mlp", _mlp, _rows(7)),
        Case("cnn", ConvNet, _images, has_batch_norm=True),
        Case("channels_last", _channels_last, _channels_last_images, has_batch_norm=True),
        Case("transformer", TiedTransformer, _tokens),
        Case("mixed_dtypes", MixedDtypes, _rows(6)),
        Case("many_tiny", ManyTiny, _rows(sum(1 + i % 3 for i in range(2000)))),
        Case("frozen", PartlyFrozen, _rows(5)),
        Case("unused", PartlyUnused, _rows(5), has_unused=True),
        Case("used_twice", UsedTwice, _rows(5)),
        Case("odd_shapes", OddShapes, _rows(5)),
        Case("complex", Complex, _rows(3)),
    )
}


class Ladder(nn.Module):
    """A model whose gradients are known without computing them.

    Each element of parameter number k (from 1) has the gradient k * x where the parameter is used
    and none where it is not. With whole numbers for x, multiples of the world size, the average is
    a whole number too, and small enough that no order of summation rounds: compare with `==`.
    """

    NAMES = "abcde"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in zip(self.NAMES, [(3,), (2, 2), (), (5,), (1, 7)], strict=True):
            self.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=dtype)))

    def forward(
        self,
        x: Any,
        used: Iterable[str] = NAMES,
        on_term: Callable[[str, Tensor], object] | None = None,
    ) -> Tensor:
        """Later names come later in forward, so their gradients come earlier in backward."""
        total: Any = 0.0 * x
        for name in sorted(used):
            term = self.get_parameter(name).sum()
            if on_term is not None:
                on_term(name, term)
            total = total + x * self.factor(name) * term
        return total

    @classmethod
    def factor(cls, name: str) -> int:
        return 1 + cls.NAMES.index(name)


def ladder_x(rank: int, step: int, world_size: int) -> float:
    """That rank's whole number at that step, a multiple of the world size."""
    return float(world_size * (rank + 1 + 2 * step))


def mean_x(step: int, world_size: int, only: Iterable[int] | None = None) -> float:
    """The average over all ranks, where those outside `only` count as zero."""
    ranks = range(world_size) if only is None else only
    total = sum(ladder_x(rank, step, world_size) for rank in ranks)
    assert total % world_size == 0
    return total / world_size

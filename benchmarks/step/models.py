"""Six models that stress different parts of a gradient synchroniser.

Data is random and made from (rank, step) alone, so that every variant sees the same batches and
nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class Model:
    """One benchmark model, with the functions that make it, its data and its loss."""

    name: str
    stresses: str
    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def build(self, seed: int) -> nn.Module:
        """Makes the model, with the same weights on every rank for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()

    def batch(self, rank: int, step: int) -> Batch:
        """Makes the batch of a rank in a step. Each rank and step has a batch of its own."""
        return self.draw(torch.Generator().manual_seed(1_000_003 * step + rank))


def gradient_bytes(module: nn.Module) -> int:
    """Returns the number of bytes of all gradients of a module."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


# mlp ----------------------------------------------------------------------------------------------


def make_mlp() -> nn.Module:
    width = 1024
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers)


def draw_mlp(generator: torch.Generator) -> Batch:
    return Batch(
        torch.randn(128, 1024, generator=generator),
        torch.randint(1024, (128,), generator=generator),
    )


# cnn ----------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1, each with BatchNorm, and a shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        channels_out = 4 * channels
        self.body = nn.Sequential(
            *convolution(channels_in, channels, 1),
            nn.ReLU(inplace=True),
            *convolution(channels, channels, 3, stride),
            nn.ReLU(inplace=True),
            *convolution(channels, channels_out, 1),
        )
        same_shape = stride == 1 and channels_in == channels_out
        self.shortcut = (
            nn.Identity()
            if same_shape
            else nn.Sequential(*convolution(channels_in, channels_out, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def convolution(channels_in: int, channels_out: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(channels_out),
    ]


def make_cnn() -> nn.Module:
    """ResNet-50: 25.6 million parameters in 161 tensors, and 159 BatchNorm buffers."""
    layers = [*convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels_in = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        channels = 64 << stage
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            layers.append(Bottleneck(channels_in, channels, stride))
            channels_in = 4 * channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def draw_cnn(generator: torch.Generator) -> Batch:
    return Batch(
        torch.randn(4, 3, 64, 64, generator=generator),
        torch.randint(1000, (4,), generator=generator),
    )


# gpt ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        query, key, value = packed.unbind(2)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """The head shares the embedding's weight, so its gradient is complete only at the very end."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def make_gpt() -> nn.Module:
    return GPT(vocabulary=8192, length=64, width=512, heads=8, depth=6)


def draw_gpt(generator: torch.Generator) -> Batch:
    tokens = torch.randint(8192, (4, 65), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:].flatten())


# wide ---------------------------------------------------------------------------------------------


def make_wide() -> nn.Module:
    return nn.Sequential(nn.Embedding(24_576, 512), nn.Linear(512, 24_576))


def draw_wide(generator: torch.Generator) -> Batch:
    tokens = torch.randint(24_576, (2, 4), generator=generator)
    return Batch(tokens[0], tokens[1])


# tiny ---------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A thousand residual linear layers; the small weights keep the sum from exploding."""

    def __init__(self, depth: int = 1000, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1 / depth**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def draw_tiny(generator: torch.Generator) -> Batch:
    return Batch(
        torch.randn(8, 16, generator=generator),
        torch.randint(16, (8,), generator=generator),
    )


# unused -------------------------------------------------------------------------------------------


class PartlyUnused(Tiny):
    """The same parameters, but every step leaves out the same three in ten.

    `has_unused` makes the variants of torch's class that need it look for unused parameters.
    """

    has_unused = True

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number % 10 < 7:
                x = x + layer(x)
        return x


MODELS = {
    model.name: model
    for model in (
        Model(
            name="mlp",
            stresses="a step about as long as its communication",
            make=make_mlp,
            draw=draw_mlp,
        ),
        Model(
            name="cnn",
            stresses="buffers to broadcast and many tensors of every size",
            make=make_cnn,
            draw=draw_cnn,
        ),
        Model(
            name="gpt",
            stresses="a long step, with a shared weight whose gradient comes last",
            make=make_gpt,
            draw=draw_gpt,
        ),
        Model(
            name="wide",
            stresses="bytes: little arithmetic, 101 MB of gradients",
            make=make_wide,
            draw=draw_wide,
        ),
        Model(
            name="tiny",
            stresses="bookkeeping: 2,000 parameters, 1 MB in all",
            make=Tiny,
            draw=draw_tiny,
        ),
        Model(
            name="unused",
            stresses="bookkeeping, with 30 % of the same parameters unused",
            make=PartlyUnused,
            draw=draw_tiny,
        ),
    )
}

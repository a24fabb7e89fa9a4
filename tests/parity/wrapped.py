"""Models for the tests of what `wrap` returns, and whether it synchronises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder


class Talker(nn.Module):
    """A model with a life of its own: attributes, methods, keyword arguments, buffers."""

    scale = 2

    def __init__(self) -> None:
        super().__init__()
        self.ladder = Ladder()
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.note = "fresh"

    @property
    def doubled(self) -> int:
        return 2 * self.scale

    def forward(self, x: float, *, times: int = 1) -> dict[str, Any]:
        self.count += self.training
        return {"loss": times * self.ladder(x), "times": times}

    def training_step(self, x: float) -> Tensor:
        """A method other than forward that runs the parameters."""
        return self.ladder(x)

    def rename(self, note: str) -> Talker:
        self.note = note
        return self


class CustomCheckpoint(nn.Module):
    """Stores its parameter under another name, as some models do for old checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        state[prefix + "old_name"] = state.pop(prefix + "weight")
        return state

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        renamed = {k.replace("old_name", "weight"): v for k, v in state_dict.items()}
        return super().load_state_dict(renamed, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def prefixed(names: Any) -> list[str]:
    return [f"module.{name}" for name in names]


def assert_synchronises(model: Any, rank: int, world_size: int, what: str) -> None:
    """For a wrapped `Ladder`."""
    for step in range(3):
        model.zero_grad()
        model(ladder_x(rank, step, world_size)).backward()
        ladder = model if isinstance(model, Ladder) else model.module
        assert_ladder(ladder, mean_x(step, world_size), (what, step))

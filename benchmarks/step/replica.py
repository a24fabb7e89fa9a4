"""One variant's copy of a model, with its optimizer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.step.models import Batch, Model
from benchmarks.step.variants import Groups, Variant, keep_memory

LEARNING_RATE = 1e-3


class Replica:
    """One variant's copy of the model, with its optimizer."""

    def __init__(self, variant: Variant, module: nn.Module, model: Model, groups: Groups) -> None:
        self.variant = variant
        self.model = model
        self.bare = module
        self.wrapped = variant.wrap(module, groups)
        self.optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)

    def backward(self, batch: Batch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.loss(self.wrapped(batch.inputs), batch.targets).backward()

    def prepare(self) -> None:
        """Sets the allocator. Call it before each backward or step, outside of the timed part."""
        keep_memory(self.variant.keeps_memory)

    def step(self, batch: Batch) -> None:
        self.backward(batch)
        self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.bare.named_parameters() if p.grad is not None}

    def state(self) -> dict[str, Tensor]:
        """Returns the weights and buffers by name."""
        return dict(self.bare.state_dict())

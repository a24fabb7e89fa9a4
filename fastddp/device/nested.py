"""The tensors inside whatever a forward takes or returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch


def tensors_in(output: object) -> Iterator[torch.Tensor]:
    """Yields the tensors in an object, in its own order.

    Args:
        output: a tensor, or lists, tuples, mappings and dataclasses with tensors in them, nested to
            any depth. Anything else holds no tensor.
    """
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_in(getattr(output, field.name))

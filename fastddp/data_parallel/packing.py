"""Tensors of one dtype side by side in one flat tensor, each in its own memory layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastddp.device.flat import DTYPES, flatten

ALIGN_BYTES = 256
"""Tensors that can be flattened begin at multiples of it, as matrix multiplication likes its
operands: cuBLAS picks its kernel by their alignment, up to this much."""


class Layout(NamedTuple):
    """How a tensor lies in memory that it fills without gaps."""

    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Returns the tensor's own layout, or row after row if it has gaps or overlaps."""
        if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
            return cls(tensor.shape, tensor.stride())
        return cls(tensor.shape, torch.empty(tensor.shape, device="meta").stride())

    def laid(self, tensor: Tensor) -> Tensor:
        """Returns a tensor with these values that lies so: itself, if it does."""
        if not self._is_of(tensor.stride()) or tensor.is_neg() or tensor.is_conj():
            new = torch.empty_strided(*self, dtype=tensor.dtype, device=tensor.device)
            return new.copy_(tensor)
        return tensor

    def _is_of(self, strides: tuple[int, ...]) -> bool:
        return strides == self.strides or all(
            size == 1 or own == due
            for size, own, due in zip(self.shape, strides, self.strides, strict=True)
        )


class Packing(NamedTuple):
    """Where each of several tensors lies in their flat one."""

    dtype: torch.dtype
    layouts: tuple[Layout, ...]
    offsets: tuple[int, ...]
    """In elements."""
    numel: int
    """Of the flat tensor."""

    @classmethod
    def of(cls, layouts: Sequence[Layout], dtype: torch.dtype) -> Packing:
        step = max(1, ALIGN_BYTES // dtype.itemsize) if dtype in DTYPES else 1
        offsets, end = [], 0
        for layout in layouts:
            begin = -(-end // step) * step
            offsets.append(begin)
            end = begin + layout.shape.numel()
        return cls(dtype, tuple(layouts), tuple(offsets), end)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns a new flat tensor with these values. What lies between them is undefined.

        Args:
            tensors: of the packing's shapes and dtype, of any strides, on one device.
        """
        laid = [layout.laid(t) for layout, t in zip(self.layouts, tensors, strict=True)]
        # In the order of memory, where `flatten` goes by rows.
        vectors = [t if t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in laid]
        if self.dtype not in DTYPES:
            return torch.cat([vector.reshape(-1) for vector in vectors])
        flat = torch.empty(self.numel, dtype=self.dtype, device=tensors[0].device)
        return flatten(vectors, out=flat, offsets=self.offsets)

    def unpack(self, flat: Tensor) -> list[Tensor]:
        """Returns tensors that share the flat one's memory, but no version counter.

        With one counter, a write to one would look to autograd like a write to all.
        """
        pairs = zip(self.layouts, self.offsets, strict=True)
        return [flat.as_strided(*layout, offset).data for layout, offset in pairs]

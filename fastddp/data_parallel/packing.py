"""Packs tensors of one dtype side by side into one flat tensor, each in its own memory layout.

Packed tensors go from device to device in one transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastddp.device.flat import DTYPES, flatten

ALIGN_BYTES = 256
"""Tensors that :func:`fastddp.flatten` takes begin at multiples of this many bytes.

cuBLAS chooses the kernel of a matrix multiplication by the alignment of its operands, up to this
much, so that packed parameters are as fast as others."""


class Layout(NamedTuple):
    """The order of a tensor's elements in memory that it fills without gaps.

    Attributes:
        shape: the shape of the tensor.
        strides: the distance in memory between neighbours along each dimension, in elements.
    """

    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Returns the tensor's own layout, or the contiguous one if it has gaps or overlaps."""
        if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
            return cls(tensor.shape, tensor.stride())
        return cls(tensor.shape, torch.empty(tensor.shape, device="meta").stride())

    def laid(self, tensor: Tensor) -> Tensor:
        """Returns a tensor with the same values in this layout: the tensor itself if it fits.

        Args:
            tensor: a tensor of this shape, of any strides.
        """
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
    """The places of several tensors in one flat tensor.

    Attributes:
        dtype: the dtype of the tensors and of the flat tensor.
        layouts: the memory layout of each tensor.
        offsets: the index in the flat tensor at which each tensor begins, in elements.
        numel: the number of elements of the flat tensor.
    """

    dtype: torch.dtype
    layouts: tuple[Layout, ...]
    offsets: tuple[int, ...]
    numel: int

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
        """Copies tensors into a new flat tensor.

        Args:
            tensors: the tensors to pack, of the packing's shapes and dtype, of any strides, all on
                one device.

        Returns:
            The flat tensor, shape ``(numel,)``. Elements between the tensors are undefined.
        """
        laid = [layout.laid(t) for layout, t in zip(self.layouts, tensors, strict=True)]
        # As vectors in the order of memory: `flatten` would copy a matrix row by row.
        vectors = [t if t.is_contiguous() else t.as_strided((t.numel(),), (1,)) for t in laid]
        if self.dtype not in DTYPES:
            return torch.cat([vector.reshape(-1) for vector in vectors])
        flat = torch.empty(self.numel, dtype=self.dtype, device=tensors[0].device)
        return flatten(vectors, out=flat, offsets=self.offsets)

    def unpack(self, flat: Tensor) -> list[Tensor]:
        """Returns the packed tensors as aliases of a flat tensor.

        Each has a version counter of its own. With one common counter, a write to one of them would
        look to autograd like a write to all.

        Args:
            flat: a flat tensor of this packing, shape ``(numel,)``.
        """
        pairs = zip(self.layouts, self.offsets, strict=True)
        return [flat.as_strided(*layout, offset).data for layout, offset in pairs]


def has_plain_memory(tensor: Tensor) -> bool:
    """Returns whether it is plain memory: not sparse, quantized or made of other tensors."""
    return (
        tensor.layout is torch.strided
        and not tensor.is_quantized
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )


@torch.no_grad()
def fused_copies(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[list[Tensor]]:
    """Copies tensors to each of several devices, in one transfer for each dtype and device.

    Args:
        tensors: the tensors to copy, of any dtypes and shapes, all on one device.
        devices: the devices to copy to.

    Returns:
        For each device the copies, in the order of ``tensors``. They are in new memory, so a graph
        that still refers to an earlier copy keeps its values.
    """
    by_dtype: dict[torch.dtype, list[int]] = {}
    copies = [list(tensors) for _ in devices]
    for index, tensor in enumerate(tensors):
        if has_plain_memory(tensor):
            by_dtype.setdefault(tensor.dtype, []).append(index)
        else:  # cannot be packed, so it travels by itself
            for row, device in zip(copies, devices, strict=True):
                row[index] = tensor.to(device, copy=True)
    if not devices:
        return []
    for dtype, indices in by_dtype.items():
        packing = Packing.of([Layout.of(tensors[index]) for index in indices], dtype)
        flat = packing.pack([tensors[index] for index in indices])
        for row, device in zip(copies, devices, strict=True):
            moved = packing.unpack(flat.to(device, non_blocking=True, copy=True))
            for index, copy in zip(indices, moved, strict=True):
                row[index] = copy
    return copies

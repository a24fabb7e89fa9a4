"""`flatten` and `unflatten`: copies between many tensors and one flat buffer, in one pass.

This is what the reducer does with the gradients of a bucket, as public functions. On a GPU a call
is one launch of the extension's kernel, on the CPU one loop. Without the extension, or on a GPU for
which it was not built, torch's operators copy the tensors one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import ModuleType

import torch
from torch import Tensor

from fastddp import config, extension

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes that :func:`flatten` takes."""


@torch.no_grad()
def flatten(
    tensors: Sequence[Tensor],
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    offsets: Sequence[int] | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """Copies tensors into one flat buffer, scaled and cast.

    Elements of 16-bit dtypes are widened to float32. Each element is multiplied by ``scale`` and
    rounded once to the buffer's dtype. The copy is fastest if each tensor begins at a multiple of
    16 bytes, both in its own memory and in the buffer. Autograd does not record the copy.

    Not collective. Threads may call it at the same time for different buffers. On a GPU the work is
    queued on the current stream.

    Args:
        tensors: at least one tensor of any shape. All are on one device and have one dtype out of
            float32, float64, float16 and bfloat16.
        out: the buffer, shape ``(n,)`` and contiguous; by default a new one. In a given buffer the
            elements between the tensors keep their values, in a new one they are zero. A tensor may
            lie at its own place in the buffer, but must not overlap any other part of it.
        dtype: the dtype of the buffer, by default that of the tensors. float64 tensors need a
            float64 buffer, and a float64 buffer needs float64 tensors.
        scale: the factor that every element is multiplied by.
        offsets: the index in the buffer at which each tensor begins, in elements and without
            overlaps; by default the tensors lie one after the other.
        moments: a contiguous float64 tensor of shape ``(2,)`` on the same device. It gets the sum
            of the squares of all written values, and 1 if all of them are finite, else 0. Equal
            inputs give equal bits.

    Returns:
        The buffer.

    Raises:
        ValueError: if there is no tensor, or if shapes, devices, dtypes or offsets do not fit.
        TypeError: if a dtype is not among those above, or only one side is float64.

    Example::

        grads = [param.grad for param in model.parameters()]
        flat = fastddp.flatten(grads, scale=1 / world_size)
        dist.all_reduce(flat)
        fastddp.unflatten(flat, grads)
    """
    places = _places(tensors, offsets)
    if out is None:
        end = max(place + tensor.numel() for place, tensor in zip(places, tensors, strict=True))
        kind = tensors[0].dtype if dtype is None else dtype
        make = torch.empty if offsets is None else torch.zeros
        out = make(end, dtype=kind, device=tensors[0].device)
    if dtype not in (None, out.dtype):
        raise ValueError(f"fastddp: dtype={dtype}, but the buffer given as out is {out.dtype}")
    _check(out, tensors, places, moments)
    native = _native(out)
    if native is not None:
        contiguous = [tensor.detach().resolve_neg().contiguous() for tensor in tensors]
        native.flatten(out, contiguous, places, scale, moments)
        torch.autograd.graph.increment_version(out)
        return out
    pieces = [out.narrow(0, place, t.numel()) for place, t in zip(places, tensors, strict=True)]
    for piece, tensor in zip(pieces, tensors, strict=True):
        write(piece.view(tensor.shape), tensor, scale)
    if moments is not None:
        squares = [piece.double().square().sum() for piece in pieces]
        finite = [piece.isfinite().all() for piece in pieces]
        moments[0], moments[1] = torch.stack(squares).sum(), torch.stack(finite).all()
    return out


@torch.no_grad()
def unflatten(
    flat: Tensor,
    tensors: Sequence[Tensor],
    *,
    scale: float = 1.0,
    offsets: Sequence[int] | None = None,
) -> None:
    """Copies the parts of a flat buffer into tensors, scaled and cast: undoes :func:`flatten`.

    The arithmetic is that of :func:`flatten`, and so are the rules for threads and streams. Not
    collective.

    Args:
        flat: the buffer, shape ``(n,)`` and contiguous, of one of the dtypes of :func:`flatten`.
        tensors: at least one tensor of any shape, written in place. All are on the buffer's device,
            have one dtype that :func:`flatten` takes, and do not overlap in memory.
        scale: the factor that every element is multiplied by.
        offsets: the index in the buffer at which each tensor begins, in elements and without
            overlaps; by default the tensors lie one after the other.

    Raises:
        ValueError: if there is no tensor, or if shapes, devices, dtypes or offsets do not fit.
        TypeError: if a dtype cannot be flattened, or only one side is float64.
    """
    places = _places(tensors, offsets)
    _check(flat, tensors, places, None)
    native = _native(flat)
    if native is not None and all(t.is_contiguous() and not t.is_neg() for t in tensors):
        native.unflatten(flat, [tensor.detach() for tensor in tensors], places, scale)
        torch.autograd.graph.increment_version(tensors)
        return
    for place, tensor in zip(places, tensors, strict=True):
        write(tensor, flat.narrow(0, place, tensor.numel()).view(tensor.shape), scale)


def write(place: Tensor, source: Tensor, scale: float) -> None:
    """Writes ``source * scale`` into ``place``, rounded once.

    Args:
        place: a real tensor, written in place.
        source: a real tensor of the same shape.
        scale: the factor that every element is multiplied by.
    """
    torch.mul(widened(source, place), scale, out=place)


def widened(source: Tensor, place: Tensor) -> Tensor:
    """Returns the source as float32 if it is narrower than that and ``place`` has another dtype.

    Else a product would be rounded to the source's 16 bits first, and to the place's dtype again.
    """
    is_cast = source.dtype != place.dtype
    return source.float() if is_cast and source.element_size() < 4 else source


def _places(tensors: Sequence[Tensor], offsets: Sequence[int] | None) -> list[int]:
    if not tensors:
        raise ValueError("fastddp: expected at least one tensor")
    if offsets is None:
        return [0, *accumulate(tensor.numel() for tensor in tensors)][:-1]
    if len(offsets) != len(tensors):
        raise ValueError(f"fastddp: {len(tensors)} tensors, but {len(offsets)} offsets")
    return list(offsets)


def _check(
    flat: Tensor, tensors: Sequence[Tensor], places: Sequence[int], moments: Tensor | None
) -> None:
    dtype, device = tensors[0].dtype, flat.device
    for kind in (dtype, flat.dtype):
        if kind not in DTYPES:
            raise TypeError(
                f"fastddp: expected floating-point tensors of up to 64 bits, got {kind}"
            )
    if dtype != flat.dtype and torch.float64 in (dtype, flat.dtype):
        raise TypeError(
            f"fastddp: no conversion between tensors of {dtype} and a flat buffer of {flat.dtype};"
            " float64 only goes with float64"
        )
    if flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(
            "fastddp: the flat buffer must have one dimension and be contiguous, got shape"
            f" {tuple(flat.shape)} and strides {flat.stride()}"
        )
    for index, tensor in enumerate(tensors):
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"fastddp: tensor {index} is {tensor.dtype} on {tensor.device}, expected {dtype} on"
                f" {device} as the others and the flat buffer"
            )
    ends = sorted(
        (place, place + tensor.numel())
        for place, tensor in zip(places, tensors, strict=True)
        if tensor.numel()
    )
    if ends and (ends[0][0] < 0 or ends[-1][1] > flat.numel()):
        raise ValueError(
            f"fastddp: the tensors take elements {ends[0][0]} to {ends[-1][1]} of a flat buffer"
            f" that has {flat.numel()}"
        )
    for (_, end), (begin, _) in pairwise(ends):
        if begin < end:
            raise ValueError(f"fastddp: two tensors overlap at element {begin} of the flat buffer")
    if moments is not None and (
        moments.dtype != torch.float64
        or moments.shape != (2,)
        or not moments.is_contiguous()
        or moments.device != device
    ):
        raise ValueError(
            f"fastddp: moments must be 2 float64 elements on {device}, one after the other, got"
            f" {moments.dtype} of shape {tuple(moments.shape)} and strides {moments.stride()} on"
            f" {moments.device}"
        )


@functools.cache
def _extension() -> ModuleType | None:
    """Returns the extension, unless ``FASTDDP_ENGINE`` says to leave it alone.

    Read once in a process: backwards flatten too, and a step reads no environment variable.
    """
    return None if config.engine() == "python" else extension.load()


def _native(flat: Tensor) -> ModuleType | None:
    """Returns the extension if it has a kernel for this device and is not to be left alone."""
    module = _extension()
    if module is None or not (flat.is_cpu or (flat.is_cuda and module.has_cuda)):
        return None
    return module

"""Gathers results of different lengths from all ranks, without padding in the result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.data import DistributedSampler

from fastddp.comm.gathering import all_gather, gather
from fastddp.comm.groups import communication_device
from fastddp.comm.launch import ensure_process_group
from fastddp.comm.objects import Json, gather_if_different
from fastddp.errors import MismatchError

_NAME = "fastddp.gather_unpadded"
_CALL = f"{_NAME}: the comparison of the ranks' tensors"
_MAX_BYTES = 2**62
_MAX_PROBLEM_CHARS = 10_000


def gather_unpadded(
    tensor: Tensor,
    *,
    sampler: DistributedSampler[int] | None = None,
    dst: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | None:
    """Concatenates the ranks' tensors along dim 0.

    The ranks may bring different numbers of rows, or none. The result has no padding. The rows are
    in rank order: all of rank 0's, then all of rank 1's, and so on. With ``sampler`` they are in
    the dataset's order instead, with one row for each sample: the rows of samples that
    ``pad="wrap"`` repeated are cut off.

    Collective: every rank of the group calls it, in the same order as the group's other
    collectives. So do not call it from several threads at once on one group.

    Args:
        tensor: this rank's rows, shape ``(rows, ...)``, of any dtype, dense and not quantized. The
            dtype and all sizes but the first are equal on all ranks. As with ``torch.cat``, a
            tensor of shape ``(0,)`` fits any others, whatever its dtype is, so that a rank without
            a batch need not know the shape.
        sampler: the sampler that chose this rank's samples, fastddp's or torch's, made with
            ``shuffle=False``. The tensor has one row for each sample, in the sampler's order.
        dst: the rank in the group that gets the result, where only one needs it; by default all
            ranks get it.
        group: the group of ranks, by default the default group. If there is none, it is made from
            the launcher's environment.

    Returns:
        The rows of all ranks, shape ``(total rows, ...)``, in new memory on the device of
        ``tensor``; None on the other ranks if ``dst`` is given. It has no autograd history, because
        gradients do not flow from one rank to another. In a process without a group, and
        in a group of one rank, the result is the tensor, detached.

    Raises:
        TypeError: if this rank's tensor is not a dense tensor, or its sampler not a sampler.
        ValueError: if this rank's tensor, sampler, ``dst`` or group cannot be used.
        MismatchError: on every rank, if the ranks' tensors do not fit together or the arguments
            differ between ranks; the message names the ranks and both values. Also if another rank
            raised one of the errors above.

    Example::

        sampler = fastddp.DistributedSampler(test, shuffle=False, pad="none")
        loader = DataLoader(test, batch_size=256, sampler=sampler)
        mine = torch.cat([model.module(inputs).argmax(1) for inputs, _ in loader])
        predictions = fastddp.gather_unpadded(mine, sampler=sampler)  # predictions[i]: of test[i]
    """
    if group is None:
        group = ensure_process_group()
    elif not isinstance(group, ProcessGroup):
        raise ValueError("fastddp.gather_unpadded: this rank is not in the process group")
    rank, world_size = (0, 1) if group is None else (group.rank(), group.size())
    try:
        _check(tensor, sampler, dst, rank, world_size)
    except (TypeError, ValueError) as error:
        if group is not None and world_size > 1:
            with contextlib.suppress(RuntimeError):  # the error itself says more than one of these
                gather_if_different(group, f"{type(error).__name__}: {error}", _parse, _CALL)
        raise
    if group is None or world_size == 1:
        return tensor.detach()

    order = "rank order"
    if sampler is not None:
        num_samples = len(_dataset(sampler))
        order = f"the order of {num_samples} samples padded to {sampler.total_size}"
    shape = tuple(tensor.shape)
    mine = _Offer(shape, tensor.dtype, tensor.device.type, order, f"dst={dst}")
    offers = _agree(group, mine)
    # A rank that brings nothing has no say in the shape and the dtype.
    like = next((offer for offer in offers if not offer.is_nothing), mine)
    parts = _exchange(group, tensor, like, [offer.num_rows for offer in offers], dst)
    if not parts:
        return None
    if sampler is None:
        rows = torch.cat(parts)
    else:
        rows = interleave(parts, min(sampler.total_size, len(_dataset(sampler))))
    return rows.view(-1).view(like.dtype).view(len(rows), *like.shape[1:]).to(tensor.device)


def interleave(parts: Sequence[Tensor], length: int) -> Tensor:
    """Puts the rows back into the dataset's order: row 0 of every part, then row 1 of every part.

    This undoes a sampler, which gives rank r every sample whose index is r modulo the world size.

    Args:
        parts: the rows of each rank, in rank order, each of shape ``(rows, n)``.
        length: the number of rows to keep.

    Returns:
        A new tensor of shape ``(length, n)``.
    """
    result = parts[0].new_empty(length, *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        places = result[rank :: len(parts)]
        places.copy_(part[: len(places)])
    return result


@dataclass(frozen=True)
class _Offer:
    """A rank's description of its rows. All but the number of rows must fit the other ranks'."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device_type: str
    order: str
    dst: str

    def to_json(self) -> list[Json]:
        """Returns the form in which it travels, for :func:`_parse` to read."""
        name = str(self.dtype).removeprefix("torch.")
        return [list(self.shape), name, self.device_type, self.order, self.dst]

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def is_nothing(self) -> bool:
        return self.shape == (0,)


def _parse(received: Any) -> _Offer | str:
    """Returns a rank's description of its rows, or the text of the error that the rank raised.

    Raises:
        ValueError, TypeError: if what was received is neither.
    """
    if isinstance(received, str):
        return received[:_MAX_PROBLEM_CHARS]
    shape, name, device_type, order, dst = received
    dtype = vars(torch).get(name)
    texts_are_texts = all(isinstance(text, str) for text in (device_type, order, dst))
    if not isinstance(dtype, torch.dtype) or not texts_are_texts:
        raise TypeError("expected a dtype, a device, an order and a destination")
    if not all(type(size) is int and size >= 0 for size in shape) or not shape:
        raise ValueError("expected sizes that are not negative")
    if math.prod(shape) * dtype.itemsize > _MAX_BYTES:
        raise ValueError(f"expected up to {_MAX_BYTES} bytes, got shape {shape} of {dtype}")
    return _Offer(tuple(shape), dtype, device_type, order, dst)


def _check(
    tensor: Tensor, sampler: DistributedSampler[int] | None, dst: int | None, rank: int, world: int
) -> None:
    """Checks what can be checked without other ranks.

    Raises:
        TypeError, ValueError: if an argument cannot be used on this rank.
    """
    name = _NAME
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{name}: a tensor of layout {tensor.layout}; call to_dense() before")
    if tensor.dim() == 0:
        raise ValueError(f"{name}: a tensor without dimensions has no rows; unsqueeze(0) makes one")
    if dst is not None and not 0 <= dst < world:
        raise ValueError(f"{name}: dst={dst} is not in 0 ... world size-1 = {world - 1}")
    if sampler is None:
        return
    if not isinstance(sampler, DistributedSampler):
        raise TypeError(f"{name}: expected a DistributedSampler, got {type(sampler).__name__}")
    if sampler.shuffle:
        raise ValueError(
            f"{name}: this sampler shuffles, so that its order is not the dataset's; make it with"
            " shuffle=False"
        )
    if (sampler.rank, sampler.num_replicas) != (rank, world):
        raise ValueError(
            f"{name}: the sampler is that of rank {sampler.rank} of {sampler.num_replicas}, the"
            f" process that of rank {rank} of {world}"
        )
    if len(tensor) != len(sampler):
        raise ValueError(
            f"{name}: rank {rank} has {len(tensor)} rows, shape {tuple(tensor.shape)}, for the"
            f" {len(sampler)} samples that its sampler gave; bring one row for each, or leave the"
            " sampler out"
        )


def _agree(group: ProcessGroup, mine: _Offer) -> list[_Offer]:
    """Returns the description of each rank's rows, in rank order. Collective.

    Raises:
        MismatchError: on every rank, if the descriptions do not fit together.
    """
    answers = gather_if_different(group, mine.to_json(), _parse, _CALL)
    if answers is None:
        return [mine] * group.size()
    for rank, answer in enumerate(answers):
        if isinstance(answer, str):
            raise MismatchError(f"fastddp: rank {rank} could not gather: {answer}")
    offers = cast(list[_Offer], answers)
    for difference in _differences(offers):
        raise MismatchError(f"fastddp.gather_unpadded: {difference}")
    return offers


def _differences(offers: Sequence[_Offer]) -> Iterator[str]:
    """Yields a sentence for each thing that does not fit together."""
    first = next((rank for rank, offer in enumerate(offers) if not offer.is_nothing), 0)
    like = offers[first]
    for rank, offer in enumerate(offers):
        for theirs, ours in ((like.dst, offer.dst), (like.order, offer.order)):
            if ours != theirs:
                yield f"rank {rank} gathers with {ours}, rank {first} with {theirs}"
        if offer.is_nothing and not like.is_nothing:
            continue
        if offer.shape[1:] != like.shape[1:]:
            yield (
                f"shape {offer.shape} on rank {rank}, {like.shape} on rank {first}; all but the"
                " first dimension must be equal"
            )
        if offer.dtype != like.dtype:
            yield (
                f"{offer.dtype} on rank {rank}, {like.dtype} on rank {first} (shapes {offer.shape}"
                f" and {like.shape}); convert one with .to()"
            )
        if offer.device_type != like.device_type:
            yield (
                f"a tensor on {offer.device_type} on rank {rank}, on {like.device_type} on rank"
                f" {first} (shapes {offer.shape} and {like.shape}); move one with .to()"
            )


def _exchange(
    group: ProcessGroup,
    tensor: Tensor,
    like: _Offer,
    num_rows: Sequence[int],
    dst: int | None,
) -> list[Tensor]:
    """Exchanges the rows of all ranks as bytes. Collective.

    Bytes, because every backend sends them but not every backend sends every dtype. Each rank's
    rows are padded to the longest on their way.

    Returns:
        The rows of each rank, in rank order, each of shape ``(rows, n)`` and dtype uint8; nothing
        on a rank that is not the destination.
    """
    device = communication_device(group)
    if like.device_type in [device.type for device in group._device_types]:
        device = torch.device(like.device_type)
    row_bytes = like.dtype.itemsize * math.prod(like.shape[1:])
    sent = torch.zeros(max(num_rows) * row_bytes, dtype=torch.uint8, device=device)
    if tensor.numel():
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        sent[: plain.nbytes] = plain.view(-1).view(torch.uint8)
    call = f"{_NAME}: the exchange of rows"
    received = all_gather(group, sent, call) if dst is None else gather(group, sent, dst, call)
    if not received:
        return []
    return [
        flat[: rows * row_bytes].view(rows, row_bytes)
        for flat, rows in zip(received, num_rows, strict=True)
    ]


def _dataset(sampler: DistributedSampler[int]) -> Sequence[object]:
    return cast("Sequence[object]", sampler.dataset)

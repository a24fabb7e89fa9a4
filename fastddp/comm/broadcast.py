"""Many tensors, broadcast in few messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.distributed import ProcessGroup

from fastddp.comm.loans import Loan, settle
from fastddp.comm.patience import wait_for
from fastddp.comm.waiting import waiting
from fastddp.device.streams import home_of, keep_for_current

_CHUNK_BYTES = 1024 * 1024


def broadcast_tensors(
    group: ProcessGroup, tensors: Sequence[torch.Tensor], root: int, call: str
) -> None:
    """Gives every rank the values that rank ``root`` of the group has. Collective.

    Args:
        group: the ranks that take part.
        tensors: tensors of any shapes, strides and dtypes, also views of each other, on one device;
            the same shapes and dtypes on every rank. They are written in place, without marking
            them as modified for autograd.
        root: the rank, within the group, that has the values; the same on every rank.
        call: the name of the call in messages, see :class:`fastddp.comm.waiting.waiting`.

    Raises:
        torch.distributed.DistBackendError: if the ranks do not meet within the group's timeout.
    """
    for chunk in _chunks(tensors):
        buffer = BroadcastBuffer(chunk)
        with waiting(group, call):
            buffer.broadcast(group, root)


class BroadcastBuffer:
    """Tensors packed into one message, again and again.

    A tensor that lies row after row is sent and received in its own memory; any other one goes
    through a copy that does, so a message is the same whatever a rank's strides are. The views of
    the packed message are kept between calls; :meth:`serves` says whether they are still right.

    Args:
        tensors: tensors of any shapes, strides and dtypes, on one device; the same shapes and
            dtypes on every rank. Empty ones and those on ``meta`` are left out of the message.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._loans: list[Loan] = []
        self._tensors = list(tensors)
        self._pointers = [tensor.data_ptr() for tensor in tensors]
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # a tensor and its copy
        sent = [tensor for tensor in tensors if tensor.numel() and not tensor.is_meta]
        self._parts = [self._as_bytes(tensor) for tensor in sent]
        total = sum(part.numel() for part in self._parts)
        self._flat: torch.Tensor | None = None
        self._views: list[torch.Tensor] = []
        if len(self._parts) > 1:
            self._flat = self._parts[0].new_empty(total)
            self._views = list(self._flat.split([part.numel() for part in self._parts]))
        lent = self._parts if self._flat is None else [self._flat]
        self._own = [copied for _, copied in self._copies]
        self._own += [] if self._flat is None else [self._flat]
        self._home = home_of(self._own[0].device) if self._own else None
        self._loans = [Loan(tensor) for tensor in lent]

    def __del__(self) -> None:
        settle(self._loans)

    def serves(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Returns whether these are the tensors, in the memory, that this was made for."""
        return len(tensors) == len(self._tensors) and all(
            tensor is mine and tensor.data_ptr() == pointer
            for tensor, mine, pointer in zip(tensors, self._tensors, self._pointers, strict=True)
        )

    def broadcast(self, group: ProcessGroup, root: int = 0) -> None:
        """Sends the values of rank ``root`` of the group to all. One collective; waits for it."""
        if not self._parts:
            return
        sends = group.rank() == root
        if sends:
            for tensor, copied in self._copies:
                copied.copy_(tensor)
        self._send_or_receive(group, root, sends)
        if not sends:
            for tensor, copied in self._copies:
                _write(tensor, copied)
        keep_for_current(self._own, self._home)

    def _send_or_receive(self, group: ProcessGroup, root: int, sends: bool) -> None:
        if self._flat is None:
            wait_for(group.broadcast(self._parts[0], root=root), group, self._parts[0].device)
            return
        if sends:
            torch.cat(self._parts, out=self._flat)
        wait_for(group.broadcast(self._flat, root=root), group, self._flat.device)
        if not sends:
            torch._foreach_copy_(self._parts, self._views)

    def _as_bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the memory of the tensor, or of a copy of it, as a vector of bytes.

        ``.data``: autograd must not take a broadcast for a modification by the user.
        """
        plain = tensor.data
        if not plain.is_contiguous() or plain.is_conj() or plain.is_neg():
            plain = _as_integers(plain)
            copied = torch.empty(plain.shape, dtype=plain.dtype, device=plain.device)
            self._copies.append((plain, copied))
            plain = copied
        return plain.view(-1).view(torch.uint8)


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor as integers of its size: not every dtype can be copied to other strides.

    But for complex ones and lazy negations, which have no such view and can be copied.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.is_complex() or tensor.is_neg():
        return tensor
    return tensor.view(integers[tensor.element_size()])


def _write(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Writes values that were read from a tensor of this kind, also if elements share memory.

    An expanded dimension has one element in memory, and torch refuses a copy to all of it.
    """
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def _chunks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Splits the tensors so that what is packed stays small; a large one goes alone, uncopied."""
    chunk: list[torch.Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        if chunk and num_bytes + tensor.nbytes > _CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(tensor)
        num_bytes += tensor.nbytes
    if chunk:
        yield chunk

"""Collectives on a process group: compare objects, broadcast many tensors at once, gather.

They use the methods of :class:`torch.distributed.ProcessGroup` alone, so that any group will do,
also one that torch's registry does not know.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.distributed import GatherOptions, ProcessGroup

from fastddp.streams import home_of, keep_for_current

T = TypeVar("T")

_CHUNK_BYTES = 1024 * 1024
_DIGEST_BYTES = 32


def gather_if_different(group: ProcessGroup, mine: T) -> list[T] | None:
    """Compares a picklable object across ranks.

    Returns:
        None on every rank if all have the same, else the objects by rank. Only digests travel in
        the first case.
    """
    data = pickle.dumps(mine)
    digests = _all_gather_bytes(group, hashlib.sha256(data).digest())
    if len(set(digests)) == 1:
        return None
    sizes = _all_gather_bytes(group, len(data).to_bytes(8, "little"))
    longest = max(int.from_bytes(size, "little") for size in sizes)
    return [pickle.loads(text) for text in _all_gather_bytes(group, data.ljust(longest, b"\0"))]


def broadcast_tensors(group: ProcessGroup, tensors: Sequence[torch.Tensor], root: int = 0) -> None:
    """Gives every rank the values that rank ``root`` of the group has.

    Args:
        group: where.
        tensors: any shapes and dtypes, on one device; the same shapes, dtypes and strides on every
            rank. Written in place, without marking them as modified for autograd.
    """
    for chunk in _chunks(tensors):
        BroadcastBuffer(chunk).broadcast(group, root)


class Loan:
    """A tensor that is lent to a transport, collective after collective.

    A transport's thread lets go of a tensor a moment after ``wait()`` has returned. Were that the
    last reference, the thread would need the GIL to free the Python object, perhaps just when the
    main thread holds it and joins the thread (``destroy_process_group``), or ends the interpreter:
    a deadlock or an abort. So whoever lends a tensor settles the loan before dropping it. Tensors
    that only C++ has seen need none of this, and nor do those on a GPU: NCCL's watchdog leaves
    tensors to the threads that call it.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._references = tensor._use_count()  # type: ignore[attr-defined]

    def is_settled(self) -> bool:
        """Returns whether the transport has let go."""
        if not self._tensor.is_cpu:
            return True
        return self._tensor._use_count() <= self._references  # type: ignore[attr-defined,no-any-return]


def settle(loans: Iterable[Loan], timeout_s: float = 1.0) -> None:
    """Waits until the transport has let go of all, or gives up after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    for loan in loans:
        while not loan.is_settled() and time.monotonic() < deadline:
            time.sleep(0)


@contextlib.contextmanager
def without_context() -> Iterator[None]:
    """Hides Python's context variables from what a collective copies of the thread's state.

    During a backward, torch keeps them in thread-local state, and a collective copies that into its
    work. The transport's thread often frees the last copy, for which it needs the GIL; if the
    interpreter is ending just then, the process aborts.
    """
    if not torch._C._is_key_in_tls("context"):
        yield
        return
    context = torch._C._get_obj_in_tls("context")
    torch._C._remove_obj_from_tls("context")
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls("context", context)


class BroadcastBuffer:
    """Tensors packed into one message, again and again.

    The packing's views are kept between calls; :meth:`serves` says whether they are still right.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._loans: list[Loan] = []
        self._tensors = list(tensors)
        self._pointers = [tensor.data_ptr() for tensor in tensors]
        parts = [_as_bytes(tensor) for tensor in tensors]
        self._parts = [part for part in parts if part.numel()]
        total = sum(part.numel() for part in self._parts)
        self._flat: torch.Tensor | None = None
        self._views: list[torch.Tensor] = []
        if len(self._parts) > 1:
            self._flat = self._parts[0].new_empty(total)
            self._home = home_of(self._flat.device)
            self._views = list(self._flat.split([part.numel() for part in self._parts]))
        lent = self._parts if self._flat is None else [self._flat]
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
        """Sends the values of rank ``root`` to all. One collective; waits for it."""
        if not self._parts:
            return
        if self._flat is None:
            group.broadcast(self._parts[0], root=root).wait()
            return
        if group.rank() == root:
            torch.cat(self._parts, out=self._flat)
        group.broadcast(self._flat, root=root).wait()
        if group.rank() != root:
            torch._foreach_copy_(self._parts, self._views)
        keep_for_current([self._flat], self._home)


def communication_device(group: ProcessGroup) -> torch.device:
    """Returns a device that the group can communicate from: the CPU where it can.

    Else the current one of a type that it can; see :func:`fastddp.streams.on_device`.
    """
    types = [device.type for device in group._device_types]
    return torch.device("cpu" if "cpu" in types else types[0])


def all_gather(group: ProcessGroup, mine: torch.Tensor) -> list[torch.Tensor]:
    """Returns the ranks' tensors by rank; of one shape and dtype, dense, without autograd."""
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    loans = [Loan(tensor) for tensor in (mine, *gathered)]
    group.allgather([gathered], [mine]).wait()
    settle(loans)
    return gathered


def gather(group: ProcessGroup, mine: torch.Tensor, dst: int) -> list[torch.Tensor]:
    """Returns on rank ``dst`` of the group what :func:`all_gather` does, elsewhere nothing."""
    gathered = [torch.empty_like(mine) for _ in range(group.size())] if group.rank() == dst else []
    loans = [Loan(tensor) for tensor in (mine, *gathered)]
    options = GatherOptions()
    options.rootRank = dst
    group.gather([gathered] if gathered else [], [mine], options).wait()
    settle(loans)
    return gathered


def _all_gather_bytes(group: ProcessGroup, data: bytes) -> list[bytes]:
    device = communication_device(group)
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    return [bytes(tensor.cpu().numpy()) for tensor in all_gather(group, mine)]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the memory of a dense tensor as a vector of bytes.

    ``.data``: autograd must not take a broadcast for a modification by the user.
    """
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} cannot be"
            " broadcast, because elements overlap or lie apart; make it .contiguous()"
        )
    return tensor.data.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


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

"""Collectives on a process group: compare objects, broadcast many tensors at once, gather.

They use the methods of :class:`torch.distributed.ProcessGroup` alone, so that any group will do,
also one that torch's registry does not know.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch.distributed import GatherOptions, ProcessGroup

from fastddp.comm.waiting import waiting
from fastddp.device.streams import home_of, keep_for_current
from fastddp.errors import MismatchError

T = TypeVar("T")
Json: TypeAlias = Sequence["Json"] | Mapping[str, "Json"] | str | int | None

_CHUNK_BYTES = 1024 * 1024
_MAX_JSON_BYTES = 256 * 1024 * 1024
"""Of what ranks compare: more than a description of a million parameters takes."""
_MAX_ERROR_CHARS = 200


def gather_if_different(
    group: ProcessGroup,
    mine: Json,
    parse: Callable[[Any], T],
    call: str,
    topic: str | None = None,
) -> list[T] | None:
    """Compares something across ranks.

    Only digests travel if all have the same. Else the things themselves do, as JSON: what comes
    from another rank is data, whoever sent it, and never code.

    Args:
        group: the ranks.
        mine: this rank's.
        parse: makes of a rank's what the caller uses; raises ValueError or TypeError for what no
            rank should have sent.
        call: for messages, see :class:`fastddp.comm.waiting.waiting`.
        topic: if given, the ranks meet in the group's store under this name, of which each needs a
            new one, and not by collectives: then some may have launched others in between.

    Returns:
        None on every rank if all have the same, else what ``parse`` made of each rank's, by rank.

    Raises:
        MismatchError: on every rank, if one has sent something else; names it.
        torch.distributed.DistBackendError: if the ranks do not meet.
    """
    data = json.dumps(mine, sort_keys=True, separators=(",", ":")).encode()
    gathered = partial(_all_gather_bytes, group, call)
    if topic is not None and (store := _store_of(group)) is not None:
        gathered = partial(_meet_in_store, store, group, call, topic)
    digests = gathered("digest", hashlib.sha256(data).digest())
    if len(set(digests)) == 1:
        return None
    sizes = [
        int.from_bytes(size, "little") for size in gathered("size", len(data).to_bytes(8, "little"))
    ]
    for rank, size in enumerate(sizes):
        if not 0 < size <= _MAX_JSON_BYTES:
            raise MismatchError(
                f"fastddp: {call}: rank {rank} wants to send {size} bytes, where 1 to"
                f" {_MAX_JSON_BYTES} are expected; do all ranks run the same version of fastddp?"
            )
    texts = gathered("text", data.ljust(max(sizes)))
    parsed = []
    for rank, (text, size, digest) in enumerate(zip(texts, sizes, digests, strict=True)):
        try:
            if hashlib.sha256(text[:size]).digest() != digest:
                raise ValueError("it is not what was announced")
            parsed.append(parse(json.loads(text[:size].decode())))
        except (ValueError, TypeError, RecursionError) as error:
            raise MismatchError(
                f"fastddp: {call}: what rank {rank} has sent cannot be understood"
                f" ({type(error).__name__}: {str(error)[:_MAX_ERROR_CHARS]}); do all ranks run the"
                " same version of fastddp?"
            ) from error
    return parsed


def broadcast_tensors(
    group: ProcessGroup, tensors: Sequence[torch.Tensor], root: int, call: str
) -> None:
    """Gives every rank the values that rank ``root`` of the group has.

    Args:
        group: where.
        tensors: any shapes, strides and dtypes, also views of each other, on one device; the same
            shapes and dtypes on every rank. Written in place, without marking them as modified for
            autograd.
        root: whose.
        call: for messages, see :class:`fastddp.comm.waiting.waiting`.
    """
    for chunk in _chunks(tensors):
        buffer = BroadcastBuffer(chunk)
        with waiting(group, call):
            buffer.broadcast(group, root)


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

    What lies row after row is sent and received in its own memory; anything else goes through a
    copy that does, so a message is the same whatever a rank's strides are. The packing's views are
    kept between calls; :meth:`serves` says whether they are still right.
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
        """Sends the values of rank ``root`` to all. One collective; waits for it."""
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
            group.broadcast(self._parts[0], root=root).wait()
            return
        if sends:
            torch.cat(self._parts, out=self._flat)
        group.broadcast(self._flat, root=root).wait()
        if not sends:
            torch._foreach_copy_(self._parts, self._views)

    def _as_bytes(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the memory of the tensor, or of its copy, as a vector of bytes.

        ``.data``: autograd must not take a broadcast for a modification by the user.
        """
        plain = tensor.data
        if not plain.is_contiguous() or plain.is_conj() or plain.is_neg():
            plain = _as_integers(plain)
            copied = torch.empty(plain.shape, dtype=plain.dtype, device=plain.device)
            self._copies.append((plain, copied))
            plain = copied
        return plain.view(-1).view(torch.uint8)


def communication_device(group: ProcessGroup) -> torch.device:
    """Returns a device that the group can communicate from: the CPU where it can.

    Else the current one of a type that it can; see :func:`fastddp.device.streams.on_device`.
    """
    types = [device.type for device in group._device_types]
    return torch.device("cpu" if "cpu" in types else types[0])


def all_gather(group: ProcessGroup, mine: torch.Tensor, call: str) -> list[torch.Tensor]:
    """Returns the ranks' tensors by rank; of one shape and dtype, dense, without autograd."""
    with waiting(group, call):
        return _all_gather(group, mine)


def gather(group: ProcessGroup, mine: torch.Tensor, dst: int, call: str) -> list[torch.Tensor]:
    """Returns on rank ``dst`` of the group what :func:`all_gather` does, elsewhere nothing."""
    gathered = [torch.empty_like(mine) for _ in range(group.size())] if group.rank() == dst else []
    loans = [Loan(tensor) for tensor in (mine, *gathered)]
    options = GatherOptions()
    options.rootRank = dst
    with waiting(group, call):
        group.gather([gathered] if gathered else [], [mine], options).wait()
    settle(loans)
    return gathered


def _all_gather(group: ProcessGroup, mine: torch.Tensor) -> list[torch.Tensor]:
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    loans = [Loan(tensor) for tensor in (mine, *gathered)]
    group.allgather([gathered], [mine]).wait()
    settle(loans)
    return gathered


def _store_of(group: ProcessGroup) -> Any:
    """Returns the group's store; None for one of the user's making, which need not have any."""
    try:
        return group.get_group_store()
    except (RuntimeError, AttributeError):
        return None


def _meet_in_store(
    store: Any, group: ProcessGroup, call: str, topic: str, what: str, data: bytes
) -> list[bytes]:
    keys = [f"fastddp {topic}/{what}/{rank}" for rank in range(group.size())]
    store.set(keys[group.rank()], data)
    with waiting(group, call):
        store.wait(keys, timeout_of(group))
        return [bytes(store.get(key)) for key in keys]


def timeout_of(group: ProcessGroup, device: torch.device | None = None) -> timedelta:
    """Returns how long a collective of a group may take, on a device.

    Torch's default for a group of the user's making, which need not have any.
    """
    backend = None
    with contextlib.suppress(RuntimeError):
        backend = group._get_backend(device or communication_device(group))
    options = getattr(backend, "options", None)
    timeout: timedelta = getattr(options, "_timeout", timedelta(minutes=30))
    return timeout


def _all_gather_bytes(group: ProcessGroup, call: str, _what: str, data: bytes) -> list[bytes]:
    device = communication_device(group)
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    with waiting(group, call):  # on a GPU it is the copy to the host that waits
        return [bytes(tensor.cpu().numpy()) for tensor in _all_gather(group, mine)]


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor as integers of its size: not every dtype can be copied to other strides.

    But for complex ones and lazy negations, which have no such view and can.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.is_complex() or tensor.is_neg():
        return tensor
    return tensor.view(integers[tensor.element_size()])


def _write(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Writes values that were read from a tensor of this kind, also if elements share memory.

    An expanded dimension has one element in memory, and copying to all of it is refused.
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

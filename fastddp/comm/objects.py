"""Objects that all ranks should have alike: compared, and exchanged only where they differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch.distributed import ProcessGroup

from fastddp.comm.gathering import all_gather_unnamed
from fastddp.comm.groups import communication_device, store_of, timeout_of
from fastddp.comm.waiting import waiting
from fastddp.errors import MismatchError

T = TypeVar("T")
Json: TypeAlias = Sequence["Json"] | Mapping[str, "Json"] | str | int | None

_Exchange = Callable[[str, bytes], list[bytes]]
"""Called with a name of what is sent and this rank's bytes; returns those of every rank."""

_MAX_JSON_BYTES = 256 * 1024 * 1024
"""The most bytes that a rank may send to be compared.

A description of a million parameters takes fewer.
"""
_MAX_ERROR_CHARS = 200


def gather_if_different(
    group: ProcessGroup,
    mine: Json,
    parse: Callable[[Any], T],
    call: str,
    topic: str | None = None,
) -> list[T] | None:
    """Compares an object across ranks. Collective.

    Only digests travel if all ranks have the same. Else the objects themselves do, as JSON: what
    comes from another rank is data, whoever sent it, and never code.

    Args:
        group: the ranks that compare.
        mine: this rank's object.
        parse: makes of a rank's object what the caller uses; raises ValueError or TypeError for an
            object that no rank should have sent.
        call: the name of the call in messages, see :class:`fastddp.comm.waiting.waiting`.
        topic: if given, the ranks meet in the group's store under this name, and not by
            collectives: then some ranks may have launched other collectives in between. Each
            comparison needs a name that was not used before in this group.

    Returns:
        None on every rank if all have the same, else what ``parse`` made of each rank's object, by
        rank.

    Raises:
        MismatchError: on every rank, if one has sent something else; names that rank.
        torch.distributed.DistBackendError: if the ranks do not meet.
    """
    data = json.dumps(mine, sort_keys=True, separators=(",", ":")).encode()
    exchange = _exchange_of(group, call, topic)
    digests = exchange("digest", hashlib.sha256(data).digest())
    if len(set(digests)) == 1:
        return None
    announced = exchange("size", len(data).to_bytes(8, "little"))
    sizes = [int.from_bytes(size, "little") for size in announced]
    _check_sizes(sizes, call)
    texts = exchange("text", data.ljust(max(sizes)))
    return [
        _parsed(text[:size], digest, parse, call, rank)
        for rank, (text, size, digest) in enumerate(zip(texts, sizes, digests, strict=True))
    ]


def _exchange_of(group: ProcessGroup, call: str, topic: str | None) -> _Exchange:
    """Returns the way on which the ranks exchange bytes of equal length."""
    if topic is not None and (store := store_of(group)) is not None:
        return partial(_meet_in_store, store, group, call, topic)
    return partial(_all_gather_bytes, group, call)


def _check_sizes(sizes: Sequence[int], call: str) -> None:
    for rank, size in enumerate(sizes):
        if not 0 < size <= _MAX_JSON_BYTES:
            raise MismatchError(
                f"fastddp: {call}: rank {rank} wants to send {size} bytes, where 1 to"
                f" {_MAX_JSON_BYTES} are expected; do all ranks run the same version of fastddp?"
            )


def _parsed(text: bytes, digest: bytes, parse: Callable[[Any], T], call: str, rank: int) -> T:
    """Returns what ``parse`` makes of a rank's text, if that has the digest it announced."""
    try:
        if hashlib.sha256(text).digest() != digest:
            raise ValueError("it is not what was announced")
        return parse(json.loads(text.decode()))
    except (ValueError, TypeError, RecursionError) as error:
        raise MismatchError(
            f"fastddp: {call}: what rank {rank} has sent cannot be understood"
            f" ({type(error).__name__}: {str(error)[:_MAX_ERROR_CHARS]}); do all ranks run the"
            " same version of fastddp?"
        ) from error


def _meet_in_store(
    store: Any, group: ProcessGroup, call: str, topic: str, what: str, data: bytes
) -> list[bytes]:
    keys = [f"fastddp {topic}/{what}/{rank}" for rank in range(group.size())]
    store.set(keys[group.rank()], data)
    with waiting(group, call):
        store.wait(keys, timeout_of(group))
        return [bytes(store.get(key)) for key in keys]


def _all_gather_bytes(group: ProcessGroup, call: str, _what: str, data: bytes) -> list[bytes]:
    device = communication_device(group)
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    with waiting(group, call):  # on a GPU it is the copy to the host that waits
        return [bytes(tensor.cpu().numpy()) for tensor in all_gather_unnamed(group, mine)]

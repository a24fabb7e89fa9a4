"""What a neighbour announces is checked before it is used: nothing of it is taken on trust."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastddp import extension
from fastddp.comm.hosts import Announcement
from fastddp.comm.meeting import Meeting, short
from tests.ranks import init_group, run_ranks

pytestmark = pytest.mark.usefixtures("needs_shm")

CPU = torch.device("cpu")


class _Wire:
    """A backend of two ranks of which the other one sends whatever a test wants."""

    def __init__(self, sent: bytes) -> None:
        self.sent = sent

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Any:
        mine, theirs = outputs[0]
        mine.copy_(inputs[0])
        theirs.copy_(torch.frombuffer(bytearray(self.sent.ljust(len(mine))), dtype=torch.uint8))
        return self

    def wait(self) -> None: ...


# The process id is a constant, because the names of the tests are made of it, and every worker that
# runs tests has to give them the same names.
HEAP = [4711, 3, 1 << 20, 5, 6]
CARD = {"host": "a", "heap": HEAP, "version": "1", "why_not": None, "trouble": None}
GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(4096),
    "bytes": bytes(range(256)) * 16,
    "half a message": json.dumps(CARD).encode()[:40],
    "a list": b"[1, 2]",
    "a number": b"7",
    "deep": b"[" * 4000,
    "a long number": b'{"trouble": null, "heap": [' + b"9" * 4000 + b"]}",
    "no card": b'{"trouble": null}',
    "trouble that is no text": json.dumps({**CARD, "trouble": 5}).encode(),
    "a host that is no text": json.dumps({**CARD, "host": [1]}).encode(),
    "a reason that is no text": json.dumps({**CARD, "why_not": {}}).encode(),
    **{
        f"a heap at {heap}": json.dumps({**CARD, "heap": heap}).encode()
        for heap in (
            "abcde",
            7,
            [],
            HEAP[:4],
            [*HEAP, 1],
            [0, *HEAP[1:]],
            [-1, *HEAP[1:]],
            [1 << 40, *HEAP[1:]],
            [True, *HEAP[1:]],
            [HEAP[0], -1, *HEAP[2:]],
            [*HEAP[:2], 0, 5, 6],
            [*HEAP[:2], 1 << 64, 5, 6],
            [*HEAP[:2], 1e6, 5, 6],
            [*HEAP[:3], -5, 6],
            [*HEAP[:3], 5, 1 << 64],
            [*HEAP[:3], 5, "6"],
        )
    },
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_in_the_handshake_is_somebodys_trouble(name, caplog):
    meeting = Meeting(_Wire(GARBAGE[name]), 0, 2)
    with caplog.at_level(logging.WARNING, "fastddp"):
        cards = meeting.exchange({key: CARD[key] for key in CARD}, Announcement.read)
    assert not meeting.all_ok
    assert cards[0] == Announcement("a", tuple(HEAP), "1", None)
    assert cards[1].heap is None
    assert "rank 1: it sent what cannot be read" in caplog.text


def test_what_is_right_in_the_handshake_is_read():
    meeting = Meeting(_Wire(json.dumps(CARD).encode()), 0, 2)
    cards = meeting.exchange({key: CARD[key] for key in CARD}, Announcement.read)
    assert meeting.all_ok
    assert cards == [Announcement("a", tuple(HEAP), "1", None)] * 2


@pytest.mark.parametrize("character", ["x", "\u00e9", "\0", "\U0001f600", '"', "\ud800"])
@pytest.mark.parametrize("length", [0, 1, 255, 256, 1365, 5000, 100_000])
def test_two_texts_fit_into_a_message_whatever_their_characters(character, length):
    text = short(character * length)
    assert text is not None
    assert text == (character * length)[: len(text)]
    assert len(json.dumps(text)) <= 1365
    assert len(text) >= min(length, 80)  # still something to read
    message = json.dumps({**CARD, "why_not": text, "trouble": text, "host": "f" * 64})
    assert len(message.encode()) <= 4096
    assert short(None) is None


def _another_file(parts: tuple[int, ...]) -> tuple[int, ...]:
    return (parts[0], 0, *parts[2:])


def _another_size(parts: tuple[int, ...]) -> tuple[int, ...]:
    return (*parts[:2], parts[2] // 2, *parts[3:])


def _another_nonce(parts: tuple[int, ...]) -> tuple[int, ...]:
    return (*parts[:4], parts[4] ^ 1)


def _no_process(parts: tuple[int, ...]) -> tuple[int, ...]:
    return ((1 << 31) - 1, *parts[1:])


class _Lying:
    """This process's heap, at another address than it has."""

    def __init__(self, address: Any, lie: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
        self._parts = lie(address.parts())

    def parts(self) -> tuple[int, ...]:
        return self._parts


def _lied_to(rank: int, world_size: int, lie: Callable[..., Any]) -> str:
    native = extension.load()
    if rank == 1:
        address = _Lying(native.shm_heap(), lie)
        native.shm_heap = lambda: address
    init_group("shm", 20)
    x = torch.full((100_000,), rank + 1.0)
    dist.all_reduce(x)
    assert bool((x == 3).all())
    return dist.group.WORLD._get_backend(CPU).name()


@pytest.mark.parametrize("lie", [_another_file, _another_size, _another_nonce, _no_process])
def test_who_lies_about_its_memory_is_not_shared_with(lie):
    assert run_ranks(_lied_to, 2, lie, init_group=False) == ["gloo", "gloo"]

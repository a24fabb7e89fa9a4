"""Messages in whatever pieces they arrive."""

from __future__ import annotations

import multiprocessing.connection
import socket
import threading
from collections.abc import Iterator

import pytest

from fastddp.comm.spawn.mailbox import Mailbox, post


@pytest.fixture
def pair() -> Iterator[tuple[Mailbox, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Mailbox(ours), theirs


def bytes_of(*messages: bytes) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in messages:
            post(theirs, message)
        return ours.recv(1000)


def test_pieces(pair: tuple[Mailbox, socket.socket]) -> None:
    mailbox, sender = pair
    taken = []
    for byte in bytes_of(b"", b"one", b"two"):
        sender.send(bytes([byte]))
        taken += mailbox.take()
    assert taken == [b"", b"one", b"two"]


def test_several_at_once(pair: tuple[Mailbox, socket.socket]) -> None:
    mailbox, sender = pair
    sender.send(bytes_of(b"", b"one", b"two")[:-1])
    assert mailbox.take() == [b"", b"one"]
    assert mailbox.holds_part
    assert mailbox.take() == []
    sender.send(b"o")
    assert mailbox.take() == [b"two"]
    assert not mailbox.holds_part
    assert not mailbox.is_closed


def test_a_sender_that_is_gone(pair: tuple[Mailbox, socket.socket]) -> None:
    mailbox, sender = pair
    sender.send(bytes_of(b"whole", b"half")[:-2])
    sender.close()
    assert mailbox.take() == [b"whole"]
    assert mailbox.is_closed
    assert mailbox.holds_part
    assert mailbox.take() == []


def test_a_message_larger_than_the_socket(pair: tuple[Mailbox, socket.socket]) -> None:
    mailbox, sender = pair
    message = bytes(range(256)) * 40_000
    thread = threading.Thread(target=post, args=(sender, message))
    thread.start()
    taken: list[bytes] = []
    while not taken:
        multiprocessing.connection.wait([mailbox], 20)
        taken = mailbox.take()
    thread.join()
    assert taken == [message]

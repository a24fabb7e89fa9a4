"""The groups that are watched: who is in them, and where the boards of their ranks are.

A rank that first sees a group writes the address of its board into the group's store, with one
``set``. Whoever wants to know reads it there, at any time: nothing waits for anybody.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from fastddp.watch import board, names
from fastddp.watch.host import this_host
from fastddp.watch.layout import Header, id_of
from fastddp.watch.notes import Notes
from fastddp.watch.peers import Address, Peer
from fastddp.watch.process import born
from fastddp.watch.questions import Questions
from fastddp.watch.snapshot import Snapshot

_STORE_TIMEOUT = timedelta(seconds=5)
_MAX_ASKED = 256
"""Of a larger group, that many ranks are asked for."""


class Watched:
    """A group that this process is in.

    The script's store is not kept alive: with it would live the server of a group that the script
    has destroyed, and with that the port.

    Args:
        name: the name of the group, the same on every rank.
        ranks: the global ranks of the members, by rank in the group.
        index: this process's rank in the group.
        store: the store of the group.
    """

    def __init__(self, name: str, ranks: Sequence[int], index: int, store: Any) -> None:
        self.name = name
        self.id = id_of(name)
        self.ranks = tuple(ranks)
        self.index = index
        self.store = weakref.ref(store)
        self.addresses: dict[int, Address] = {}
        """By global rank, as far as they are known."""
        self.notes = Notes(index)
        self.questions = Questions(index)
        self.looked_for_questions_ns = 0
        self.addresses_due_ns = 0
        """When addresses are to be looked for next, if nobody waits."""
        self.addresses_pause_s = 0.5
        self._client: Any = None

    @property
    def is_alive(self) -> bool:
        """Whether the script still has the group."""
        return self.store() is not None

    @property
    def is_known(self) -> bool:
        """Whether all addresses that are asked for are known."""
        return len(self.addresses) >= min(len(self.ranks), _MAX_ASKED)

    def client(self) -> Any:
        """Returns a client of the store that no other thread uses, or None. For the clerk alone.

        Another thread may be blocked in a store over TCP until something is there. In others it
        blocks nobody, and what clones of theirs are set to, such as a timeout, they are set to.
        """
        store = self.store()
        if store is None:
            self._client = None
        elif not _is_over_tcp(store):
            return store
        elif self._client is None:
            self._client = store.clone()
            self._client.set_timeout(_STORE_TIMEOUT)
        return self._client

    @property
    def has_strangers(self) -> bool:
        """Whether the boards of some ranks cannot be read here, or are not known to be readable."""
        readable = sum(
            is_here(address) and not peer(address).has_failed
            for address in [*self.addresses.values()]
        )
        return readable < len(self.ranks)

    @property
    def spans_hosts(self) -> bool:
        """Whether some ranks are on other hosts, for certain."""
        return self.is_known and sum(map(is_here, [*self.addresses.values()])) < len(self.ranks)

    def ask(self, ranks: Collection[int], about: object) -> None:
        """Asks ranks of other hosts what they do, by rank in the group. For the clerk alone.

        Args:
            ranks: the ranks in the group.
            about: what this rank waits in.
        """
        client = self.client()
        if client is not None:
            self.questions.ask(client, ranks, about)

    def answer(self, text: Callable[[], str]) -> None:
        """Answers what ranks of other hosts ask. For the clerk alone."""
        client = self.client()
        if client is not None:
            self.questions.answer(client, text)

    def write_note(self) -> None:
        """Writes this rank's note. For the clerk alone."""
        client = self.client()
        if client is not None:
            self.notes.write(client)

    def read_notes(self) -> None:
        """Reads the notes of the other ranks. For the clerk alone."""
        client = self.client()
        if client is not None:
            self.notes.read(client, range(min(len(self.ranks), _MAX_ASKED)))

    def read_addresses(self) -> None:
        """Asks the store for the addresses that are not known yet. For the clerk alone."""
        client = self.client()
        if client is None:
            return
        for index, rank in enumerate(self.ranks[:_MAX_ASKED]):
            if rank not in self.addresses and client.check([_key(index)]):
                address = Address.parse(client.get(_key(index)))
                if address is not None:
                    self.addresses[rank] = address


def _is_over_tcp(store: Any) -> bool:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return isinstance(store, TCPStore)


_groups: dict[str, Watched] = {}
_peers: dict[Address, Peer] = {}
_host = ""


def watch_group(name: str, ranks: Sequence[int], index: int, store: Any) -> bool:
    """Begins to watch a group. Not collective; takes one ``set`` in the store.

    Args:
        name: the name of the group, the same on every rank.
        ranks: the global ranks of the members, by rank in the group.
        index: this process's rank in the group.
        store: the group's store; not kept alive.

    Returns:
        Whether the group is watched now and was not before.
    """
    known = _groups.get(name)
    if len(ranks) < 2 or (known is not None and known.store() is store):
        return False
    own = board.make()
    if own is None:
        return False
    if name == names.DEFAULT_GROUP or not any(group.is_alive for group in [*_groups.values()]):
        own.put(Header.RANK, ranks[index])  # it may be another one than in an earlier world
    group = Watched(name, ranks, index, store)
    try:
        store.set(_key(index), str(own_address(own.fd)))
    except (RuntimeError, OSError):
        return False
    _groups[name] = group
    names.introduce_group(group.id, name)
    return True


def watched() -> list[Watched]:
    """Returns the groups that the script still has, and forgets the others."""
    ended = [name for name, group in list(_groups.items()) if not group.is_alive]
    for name in ended:
        _groups.pop(name, None)
    alive = list(_groups.values())
    if ended:  # what is known of the ranks of no other group holds a descriptor each
        known = {address for group in alive for address in group.addresses.values()}
        for address in _peers.keys() - known:
            _peers.pop(address).close()
    return alive


def find(name: str) -> Watched | None:
    """Returns the watched group with a name; None if there is none."""
    return _groups.get(name)


def own_address(fd: int) -> Address:
    """Returns the address of a board of this process, by its descriptor."""
    return Address(own_host(), os.getpid(), born(os.getpid()) or 0, fd)


def own_host() -> str:
    """Returns what :func:`this_host` does, asked once; this process alone if that is not known."""
    global _host
    if not _host:
        _host = f"{os.getpid():x}"
        with contextlib.suppress(OSError):
            _host = this_host()
    return _host


def is_here(address: Address) -> bool:
    """Returns whether a board can be read by the processes of this host."""
    return address.host == own_host() and address.fd >= 0


def peer(address: Address) -> Peer:
    """Returns the board at an address."""
    return _peers.setdefault(address, Peer(address))


def board_of(rank: int) -> Snapshot | None:
    """Returns what the board of a rank of this host says now; None if it cannot be read.

    Args:
        rank: the global rank.
    """
    for group in [*_groups.values()]:
        address = group.addresses.get(rank)
        if address is not None and is_here(address):
            return peer(address).read()
    return None


def _key(index: int) -> str:
    return f"fastddp board/{index}"


def forget() -> None:
    """Watches no group any more, in a forked child."""
    _groups.clear()
    _peers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)

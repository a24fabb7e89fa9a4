"""Notes in a group's store: what a rank waits in, for ranks that cannot read its board.

A rank that waits leaves a note, and takes it back when it goes on. The note of a wait that has
failed stays until the group's next one is over: ranks that fail a moment later read it.
"""

from __future__ import annotations

from typing import Any

MAX_CHARS = 200


class Notes:
    """This rank's note in one group, and those of the others.

    Args:
        index: this process's rank in the group.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._written = ""
        self._wanted = ""
        self._failed = False
        self.others: dict[int, str] = {}
        """By rank in the group; without those that have left no note."""

    def want(self, text: str) -> bool:
        """Decides what this rank's note is to be; returns whether :meth:`write` is called for.

        Args:
            text: what this rank waits in; empty if it does not wait.
        """
        if text or not self._failed:
            self._wanted = text[:MAX_CHARS]
        return self._wanted != self._written

    def end(self, failed: bool) -> None:
        """Takes note that a wait of the group has ended.

        Args:
            failed: whether it has raised.
        """
        self._failed = failed and bool(self._wanted)

    def write(self, store: Any) -> None:
        """Writes the note into the group's store."""
        text = self._wanted
        store.set(_key(self._index), text)
        self._written = text

    def read(self, store: Any, ranks: range) -> None:
        """Reads the notes of other ranks.

        Args:
            store: the group's store.
            ranks: their ranks in the group.
        """
        for rank in ranks:
            if rank == self._index:
                continue
            note = _read(store, rank)
            if note:
                self.others[rank] = note
            else:
                self.others.pop(rank, None)


def _read(store: Any, rank: int) -> str:
    if not store.check([_key(rank)]):
        return ""
    data: bytes = store.get(_key(rank))
    text = data[: 4 * MAX_CHARS].decode(errors="replace")[:MAX_CHARS]
    return text if text.isprintable() else "something unreadable"


def _key(rank: int) -> str:
    return f"fastddp waits/{rank}"

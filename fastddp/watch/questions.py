"""Questions to ranks on other hosts, through a group's store: what do you do instead?

A rank that waits writes a question for each rank that is missing. A rank looks for a question every
few seconds, in groups that span hosts only, and answers it once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from typing import Any

_MAX_CHARS = 300


class Questions:
    """The questions that this rank asks and is asked in one group.

    Args:
        index: this process's rank in the group.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._answered = b""
        self._about: object = None
        self._asked: dict[int, bytes] = {}  # what each had answered before
        self.answers: dict[int, str] = {}
        """By rank in the group; without those that have not answered."""

    def ask(self, store: Any, ranks: Collection[int], about: object = None) -> None:
        """Asks some ranks, unless they are asked already, and reads what they have answered.

        Args:
            store: the group's store.
            ranks: their ranks in the group; the answers of others are forgotten.
            about: what this rank waits in; the answers to questions about something else are old.
        """
        if about != self._about:
            self._about = about
            self._asked.clear()
            self.answers.clear()
        for rank in [rank for rank in self._asked if rank not in ranks]:
            del self._asked[rank]
            self.answers.pop(rank, None)
        for rank in ranks:
            if rank not in self._asked:
                self._asked[rank] = _answer_in(store, rank)
                # Another one for each wait and each rank that asks: what it does has changed since.
                question = f"{self._index} {os.getpid()} {time.monotonic_ns()}"
                store.set(f"fastddp asks/{rank}", question)
            else:
                self._read(rank, _answer_in(store, rank))

    def _read(self, rank: int, data: bytes) -> None:
        """Takes an answer that was not there before the question.

        It may be the answer to another rank, which has asked at the same time and so replaced this
        rank's question.
        """
        _, _, answer = data.partition(b"\n")
        text = answer[: 4 * _MAX_CHARS].decode(errors="replace")[:_MAX_CHARS]
        if data != self._asked[rank] and text.isprintable():
            self.answers[rank] = text

    def answer(self, store: Any, text: Callable[[], str]) -> None:
        """Answers a question, if there is a new one.

        Args:
            store: the group's store.
            text: returns what this rank does.
        """
        if not store.check([f"fastddp asks/{self._index}"]):
            return
        question: bytes = store.get(f"fastddp asks/{self._index}")[:_MAX_CHARS]
        if question != self._answered:
            said = text()[:_MAX_CHARS].encode(errors="replace")
            store.set(f"fastddp answers/{self._index}", question + b"\n" + said)
            self._answered = question


def _answer_in(store: Any, rank: int) -> bytes:
    key = f"fastddp answers/{rank}"
    return bytes(store.get(key)) if store.check([key]) else b""

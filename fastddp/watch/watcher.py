"""The thread that looks at what this process waits for, about once per second.

As long as it waits for nothing, a look costs tens of microseconds. Once it does, the boards of the
other ranks are read; after ``FASTDDP_STALL_SECONDS`` it is told who is missing, and why.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from fastddp import config
from fastddp.watch import board, groups, named, text
from fastddp.watch.board import Board
from fastddp.watch.clerk import Clerk
from fastddp.watch.correspondence import Correspondence
from fastddp.watch.groups import Watched
from fastddp.watch.layout import Header
from fastddp.watch.meeting_points import absent_from, reached_from, together_with, waits_of
from fastddp.watch.named import NamedWait
from fastddp.watch.own_waits import OwnWaits
from fastddp.watch.referee import Referee
from fastddp.watch.script_threads import may_begin_collectives
from fastddp.watch.sequences import sequence_of
from fastddp.watch.sight import Sight, look_at_me
from fastddp.watch.stack import answer, let_ask
from fastddp.watch.teller import Teller
from fastddp.watch.timing import Timing
from fastddp.watch.view import View

_log = logging.getLogger("fastddp")

_ASK_AFTER_S = 2.0  # by then all who wait have left their notes
_REMEMBER_S = 2.5


class Watcher:
    """What the thread knows. One :meth:`look` is what it does in one tick.

    Args:
        own_board: the board of this process.
        clerk: the thread that asks stores.
    """

    def __init__(self, own_board: Board, clerk: Clerk) -> None:
        self.timing = Timing(config.stall_seconds())
        self._board = own_board
        self._own_waits = OwnWaits(own_board, self.timing)
        self._correspondence = Correspondence(clerk, self.timing, self._about_me)
        self._sight = Sight()
        self._teller = Teller(self._sight, self.timing)
        self._referee: Referee | None = None
        if config.stall() == "raise":
            self._referee = Referee(own_board, self._sight, self.timing)
        self._looked_ns = time.monotonic_ns()
        self._observed_s: dict[tuple[int, int], float] = {}  # of waits, by their keys
        signal, fd = let_ask()
        own_board.put(Header.STACK_SIGNAL, signal)
        own_board.put(Header.STACK_FILE, fd)

    def look(self) -> None:
        """Looks once. To be called by one thread."""
        now_ns = time.monotonic_ns()
        lasted_s = (now_ns - self._looked_ns) / 1e9
        self._looked_ns = now_ns
        self._board.put(Header.SEEN, now_ns)
        answer()
        self._own_waits.show(now_ns)
        mine = self._board.read()
        watched = groups.watched()
        self._correspondence.exchange(watched, mine, now_ns)
        self._teller.tell_ends(mine, now_ns)
        waits = waits_of(mine)
        # A process that was suspended, or starved, has not watched for all of that time.
        watched_s = min(lasted_s, 2 * self.timing.tick_s)
        before = self._observed_s
        self._observed_s = {w.key: before.get(w.key, 0.0) + watched_s for w in waits}
        if not before.keys() & self._observed_s.keys():
            self._sight.begin()
        if not waits or mine.rank is None:
            if self._referee is not None:
                self._referee.forget()
            return
        self._show_what_may_come(watched)
        mine = self._board.read()
        view = self._sight.view(watched, mine, now_ns)
        self._sight.count(view, reached_from(view, [view.me]))
        lasting = [w for w in waits if self._observed_s[w.key] >= self.timing.stall_s / 2]
        self._correspondence.ask_strangers(watched, view, lasting)
        self._name_absent(view)
        for wait in waits:
            self._teller.tell(view, wait, self._observed_s[wait.key])
        if self._referee is not None and (failed := self._referee.end_deadlock(view, watched_s)):
            self._teller.forget(failed)  # the error says it all

    def _show_what_may_come(self, watched: Sequence[Watched]) -> None:
        """Shows others what they need to know before they are sure of a deadlock."""
        numbers = {group.id: sequence_of(group.name) for group in watched}
        self._board.put_sequences({g: n for g, n in numbers.items() if n is not None})
        self._board.put(Header.SCRIPT_THREADS, may_begin_collectives())

    def end(self) -> None:
        """Tells what there is left to tell, when the process is about to end."""
        self._teller.tell_ends(self._board.read(), time.monotonic_ns())

    def _about_me(self) -> str:
        return text.answer_text(look_at_me(self._board.read()), time.monotonic_ns())

    def _name_absent(self, view: View) -> None:
        """Has named waits know who is missing, for the error that may end them.

        Other ranks may fail a moment before this one, so what was seen of them counts for a while.
        """
        mine = waits_of(view.board(view.me))
        for wait in list(named.waits.values()):
            lasted_s = (view.now_ns - wait.since_ns) / 1e9
            # Where another thread of this process carries it out, the wait is that thread's.
            seen = next((w for w in mine if wait.thread == w.thread or wait.call == w.text), None)
            if wait.group is None or seen is None or lasted_s < self.timing.soon_s(_ASK_AFTER_S):
                continue
            wait.came.update(together_with(view, view.me, seen))
            absent = [rank for rank in absent_from(view, view.me, seen) if rank not in wait.came]
            for rank in absent:
                if what := text.where(view, rank):
                    wait.elsewhere[rank] = view.now_ns, what
            known = {
                rank: what
                for rank, (when_ns, what) in wait.elsewhere.items()
                if view.now_ns - when_ns < 1e9 * _REMEMBER_S
            }
            wait.absent = text.missing_text({rank: known.get(rank, "") for rank in absent})


# ---- the thread ----------------------------------------------------------------------------------


class _Thread:
    """The thread of this process, from the first group that is watched on."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begins anew, in a forked child, which has no thread."""
        self.clerk = Clerk()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self, own_board: Board) -> None:
        with self._lock:
            if self._thread is None:
                watcher = Watcher(own_board, self.clerk)
                thread = threading.Thread(
                    target=self._run, args=(watcher,), name="fastddp watch", daemon=True
                )
                thread.start()
                self._thread = thread
                self.clerk.start()

    def stop(self) -> None:
        """Ends the thread: it must not be in a store when the interpreter takes itself apart."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        self.clerk.stop()

    def _run(self, watcher: Watcher) -> None:
        while not self._stop.wait(watcher.timing.tick_s):
            try:
                watcher.look()
            except Exception:  # whatever it is, the training must not suffer from being watched
                _log.debug("a look at the other ranks has failed", exc_info=True)
        with contextlib.suppress(Exception):
            watcher.end()


_thread = _Thread()


def watch_group(name: str, ranks: Sequence[int], index: int, store: Any) -> None:
    """Watches a group, see :func:`fastddp.watch.groups.watch_group`. Not collective.

    Args:
        name: the name of the group, the same on every rank.
        ranks: the global ranks of the members, by rank in the group.
        index: this process's rank in the group.
        store: the group's store; not kept alive.

    Raises:
        ValueError: if ``FASTDDP_STALL`` or ``FASTDDP_STALL_SECONDS`` is not valid. A system that
            does not let the group be watched raises nothing.
    """
    config.stall()
    config.stall_seconds()
    try:
        if groups.watch_group(name, ranks, index, store):
            own_board = board.own()
            if own_board is not None:
                _thread.start(own_board)
    except Exception:  # such as no memory for another thread
        _log.debug("group %s is not watched", name, exc_info=True)


def begin(call: str, group_name: str) -> NamedWait:
    """Begins a wait that has a name. Takes microseconds, and touches no store.

    Args:
        call: what the script has called, and what goes on in that call.
        group_name: the name of the group that is waited for.
    """
    wait = NamedWait(call, groups.find(group_name))
    named.waits[id(wait)] = wait
    return wait


def end(wait: NamedWait, failed: bool) -> None:
    """Ends a wait that has a name.

    Args:
        wait: what :func:`begin` has returned.
        failed: whether it has raised.
    """
    named.waits.pop(id(wait), None)
    if failed:
        named.failed_ns = time.monotonic_ns()
    own_board = board.own()
    if wait.place is not None and own_board is not None:
        place, wait.place = wait.place, None
        own_board.end_wait(place)
    if wait.group is not None:
        wait.group.notes.end(failed)


def _forget() -> None:
    named.waits.clear()
    _thread.forget()


atexit.register(_thread.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

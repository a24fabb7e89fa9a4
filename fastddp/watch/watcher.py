"""The thread that looks at what this process waits for, about once per second.

As long as it waits for nothing, a look costs a fraction of a millisecond. Once it does, the boards
of the other ranks are read; after ``FASTDDP_STALL_SECONDS`` it is told who is missing, and why.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastddp import config
from fastddp.watch import board, events, groups, named, text
from fastddp.watch.board import Board
from fastddp.watch.clerk import Clerk
from fastddp.watch.deadlock import FRESH_NS, deadlock
from fastddp.watch.describe import describe_wait
from fastddp.watch.frames import Frame, is_at_breakpoint, own, place_in_script
from fastddp.watch.groups import Watched
from fastddp.watch.layout import Header, Source, id_of
from fastddp.watch.meeting_points import absent_from, reached_from, waits_of
from fastddp.watch.named import NamedWait
from fastddp.watch.out_of_memory import out_of_memory_kills
from fastddp.watch.process import Kind, State, cpu_s_of_tree, loader_workers, state_of
from fastddp.watch.say import say
from fastddp.watch.script_call import collective_of_script
from fastddp.watch.snapshot import Snapshot, WaitSeen
from fastddp.watch.stack import answer, ask, let_ask
from fastddp.watch.stall import Cause, Stall, judge, speaks
from fastddp.watch.view import Facts, Member, View

_log = logging.getLogger("fastddp")

_MAX_TICK_S, _MIN_TICK_S = 1.0, 0.05
_TICKS_PER_STALL = 5
_NOTE_AFTER_S = 1.0
_PATIENCE_S = 1.5
"""For the answer of a watcher that looks once per second."""
_SCRIPT_AFTER_S = 1.0
_ASK_AFTER_S = 2.0  # by then all who wait have left their notes
_BUSY_FACTOR = 30
"""Of ranks that compute, the others tell only after that many times the seconds."""
_ASKS_EARLY = 64
"""In groups of at most that many ranks, boards are looked for before anybody waits."""

_ALL_FIND_NS = 5_000_000_000
"""How long a rank that has found a deadlock waits for the others to find it too."""

_Key = tuple[int, int, int]


def _key(rank: int, wait: WaitSeen) -> _Key:
    """Returns what tells a wait from the next one at the same place."""
    return rank, wait.place, wait.since_ns


@dataclass
class _Told:
    """A stall that this process has told of."""

    stall: Stall
    next_at_s: float


class Watcher:
    """What the thread knows. One :meth:`look` is what it does in one tick.

    Args:
        own_board: the board of this process.
        clerk: the thread that asks stores.
    """

    def __init__(self, own_board: Board, clerk: Clerk) -> None:
        self._board = own_board
        self._clerk = clerk
        self._mode = config.stall()
        self._seconds = config.stall_seconds()
        self.tick_s = min(_MAX_TICK_S, max(_MIN_TICK_S, self._seconds / _TICKS_PER_STALL))
        self._looked_ns = time.monotonic_ns()
        self._observed_s: dict[_Key, float] = {}
        self._told: dict[_Key, _Told] = {}
        self._cpu_s: dict[int, tuple[int, float]] = {}  # of ranks: when, and how much by then
        self._kills = out_of_memory_kills()
        self._script: tuple[Any, int, int | None] | None = None  # call, since, place
        self._suspected: frozenset[_Key] = frozenset()
        self._deadlock = ""  # the text of the error, once it is certain
        self._deadlock_ns = 0
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
        self._show_named(now_ns)
        self._show_script(now_ns)
        mine = self._board.read()
        waits = waits_of(mine)
        watched = groups.watched()
        self._ask_stores(watched, mine, waits, now_ns)
        self._tell_ends(mine, now_ns)
        if not waits or mine.rank is None:
            self._observed_s.clear()
            self._cpu_s.clear()
            self._suspected = frozenset()
            self._take_back_deadlock()
            return
        view = self._view(watched, mine, now_ns)
        # A process that was suspended, or starved, has not watched for all of that time.
        self._observe(view, waits, min(lasted_s, 2 * self.tick_s))
        self._name_absent(view)
        self._tell_stalls(view, waits)
        self._end_deadlock(view)

    def end(self) -> None:
        """Tells what there is left to tell, when the process is about to end."""
        self._tell_ends(self._board.read(), time.monotonic_ns())

    # ---- what Python writes on the board ---------------------------------------------------------

    def _show_named(self, now_ns: int) -> None:
        for wait in list(named.waits.values()):
            if wait.place is None and now_ns - wait.since_ns >= 1e9 * self._patience(_NOTE_AFTER_S):
                wait.place = self._board.begin_wait(
                    Source.NAMED,
                    wait.call,
                    since_ns=wait.since_ns,
                    group=wait.group.id if wait.group is not None else 0,
                    thread=wait.thread,
                )
                if id(wait) not in named.waits:  # it has ended meanwhile
                    place, wait.place = wait.place, None
                    self._board.end_wait(place)

    def _show_script(self, now_ns: int) -> None:
        call = collective_of_script()
        if self._script is not None and (call is None or call != self._script[0]):
            self._board.end_wait(self._script[2])
            self._script = None
        if call is None:
            return
        if self._script is None:
            self._script = call, now_ns, None
        _, since_ns, place = self._script
        if place is None and now_ns - since_ns >= 1e9 * self._patience(_SCRIPT_AFTER_S):
            place = self._board.begin_wait(
                Source.SCRIPT,
                f"{call.call} on group '{call.group_name}'",
                since_ns=since_ns,
                group=id_of(call.group_name),
                thread=threading.main_thread().native_id or 0,
            )
            self._script = call, since_ns, place

    def _patience(self, seconds: float) -> float:
        return min(seconds, self._seconds / _TICKS_PER_STALL)

    # ---- stores ----------------------------------------------------------------------------------

    def _ask_stores(
        self, watched: Sequence[Watched], mine: Snapshot, waits: Sequence[WaitSeen], now_ns: int
    ) -> None:
        for group in watched:
            if not group.is_known and (waits or len(group.ranks) <= _ASKS_EARLY):
                self._clerk.ask(f"addresses {group.name}", group.read_addresses)
            note = ""
            if group.has_strangers:
                for wait in waits:
                    lasted_s = (now_ns - wait.since_ns) / 1e9
                    if wait.group == group.id and lasted_s >= self._patience(_NOTE_AFTER_S):
                        note = describe_wait(wait, mine)
                if note:
                    self._clerk.ask(f"notes {group.name}", group.read_notes)
            if group.notes.want(note):
                self._clerk.ask(f"note {group.name}", group.write_note)

    def _name_absent(self, view: View) -> None:
        """Has named waits know who is missing, for the error that may end them."""
        for wait in list(named.waits.values()):
            lasted_s = (view.now_ns - wait.since_ns) / 1e9
            if wait.group is None or lasted_s < self._patience(_ASK_AFTER_S):
                continue
            mine = waits_of(view.board(view.me))
            # Where another thread of this process carries it out, the wait is that thread's.
            seen = next((w for w in mine if wait.thread == w.thread or wait.call == w.text), None)
            if seen is not None:
                wait.absent = text.missing_text(view, absent_from(view, view.me, seen))

    # ---- what is known ---------------------------------------------------------------------------

    def _view(self, watched: Sequence[Watched], mine: Snapshot, now_ns: int) -> View:
        assert mine.rank is not None
        members = {mine.rank: Member(mine.rank, mine, Facts(State(Kind.RUNNING)))}
        for group in watched:
            for index, rank in enumerate(group.ranks):
                known = members.get(rank)
                if rank == mine.rank or (known is not None and (known.board or known.note)):
                    continue
                member = _member(group, index, rank)
                if member is not None:
                    members[rank] = member
        return View(mine.rank, now_ns, {group.id: group.ranks for group in watched}, members)

    def _observe(self, view: View, waits: Sequence[WaitSeen], lasted_s: float) -> None:
        keys = {_key(view.me, wait) for wait in waits}
        if not keys & self._observed_s.keys():
            self._cpu_s.clear()
        self._observed_s = {key: self._observed_s.get(key, 0.0) + lasted_s for key in keys}
        for rank in reached_from(view, [view.me]) - self._cpu_s.keys():
            board_of = view.board(rank)
            if board_of is not None:
                self._cpu_s[rank] = view.now_ns, cpu_s_of_tree(board_of.pid)

    def _with_cpu(self, view: View, ranks: Collection[int]) -> View:
        members = dict(view.members)
        for rank in ranks:
            member = members.get(rank)
            if member is None or member.board is None or member.facts is None:
                continue
            since_ns, before_s = self._cpu_s.get(rank, (view.now_ns, 0.0))
            elapsed_s = (time.monotonic_ns() - since_ns) / 1e9
            used_s = cpu_s_of_tree(member.board.pid) - before_s
            share = used_s / elapsed_s if since_ns < view.now_ns else 0.0
            kills = out_of_memory_kills()
            facts = replace(
                member.facts, cpu_share=share, killed_for_memory=(kills or 0) > (self._kills or 0)
            )
            members[rank] = replace(member, facts=facts)
        return replace(view, members=members)

    def _with_stacks(self, view: View, ranks: Collection[int]) -> View:
        members = dict(view.members)
        for rank in ranks:
            member = members.get(rank)
            if member is None or member.board is None or member.facts is None:
                continue
            them = member.board
            frames = own() if rank == view.me else _stack_of(them)
            workers = tuple(state for _, state in loader_workers(them.pid))
            facts = replace(member.facts, frames=tuple(frames), workers=workers)
            members[rank] = replace(member, facts=facts)
        return replace(view, members=members)

    # ---- telling ---------------------------------------------------------------------------------

    def _tell_stalls(self, view: View, waits: Sequence[WaitSeen]) -> None:
        for wait in waits:
            key = _key(view.me, wait)
            observed_s = self._observed_s[key]
            told = self._told.get(key)
            if observed_s < (told.next_at_s if told is not None else self._seconds):
                continue
            if wait.group not in view.groups or not speaks(view, int(1e9 * self._seconds)):
                continue
            self._tell(view, wait, key, observed_s)
            return  # the other waits of this process are told of at later ticks, if they last

    def _tell(self, view: View, wait: WaitSeen, key: _Key, observed_s: float) -> None:
        concerned = reached_from(view, [view.me])
        view = self._with_cpu(view, concerned)
        stall = judge(view, view.me, wait, observed_s)
        if stall.is_busy and observed_s < _BUSY_FACTOR * self._seconds:
            return
        view = self._with_stacks(view, [absence.rank for absence in stall.absences])
        mine = own()
        stall = judge(view, view.me, wait, observed_s)
        before = self._told.get(key)
        next_at_s = 2 * (before.next_at_s if before is not None else self._seconds)
        while next_at_s <= observed_s:
            next_at_s *= 2
        self._told[key] = _Told(stall, next_at_s)
        if before is None and stall.roots:
            events.record(events.Kind.STALL_BEGIN, wait.owner, stall.roots[0].rank)
        if not stall.is_debugged and not is_at_breakpoint(mine):
            say(text.stall_lines(stall, view, place_in_script(mine)))

    def _tell_ends(self, mine: Snapshot, now_ns: int) -> None:
        waits = waits_of(mine)
        for key, told in list(self._told.items()):
            if any(_key(key[0], wait) == key for wait in waits):
                continue
            del self._told[key]
            has_failed = named.failed_ns >= told.stall.wait.since_ns
            stall, lasted_ns = told.stall, now_ns - told.stall.wait.since_ns
            if stall.roots:
                fault = stall.roots[0].rank
                events.record(events.Kind.STALL_END, stall.wait.owner, fault, lasted_ns)
            if not stall.is_debugged and not has_failed and _may_have_come(stall):
                say([text.end_line(stall, lasted_ns / 1e9)])

    # ---- deadlocks -------------------------------------------------------------------------------

    def _end_deadlock(self, view: View) -> None:
        """Has this process's wait fail if the ranks can never move, at the same time on all ranks.

        The first one to fail would end its process, and so make the others fail for that reason.
        """
        stuck = deadlock(view, int(1e9 * self._seconds))
        mine = stuck.get(view.me)
        suspected = frozenset(_key(rank, wait) for rank, wait in stuck.items())
        is_certain = mine is not None and suspected == self._suspected
        self._suspected = suspected
        if not is_certain or mine is None or self._mode != "raise":
            self._take_back_deadlock()
            return
        if not self._deadlock:
            view = self._with_stacks(view, stuck.keys())
            self._deadlock = text.deadlock_text(stuck, view)
            self._deadlock_ns = time.monotonic_ns()
            self._board.put(Header.DEADLOCK, self._deadlock_ns)
            return
        found_ns = [them.deadlock_ns for rank in stuck if (them := view.board(rank)) is not None]
        if not all(found_ns) and view.now_ns - self._deadlock_ns < _ALL_FIND_NS:
            return
        end_ns = min(max(found_ns), view.now_ns) + int(1e9 * self.tick_s)
        time.sleep(max(0, end_ns - time.monotonic_ns()) / 1e9)
        if self._board.order_to_fail(mine, self._deadlock):
            self._told.pop(_key(view.me, mine), None)  # the error says it all

    def _take_back_deadlock(self) -> None:
        if self._deadlock:
            self._deadlock = ""
            self._board.put(Header.DEADLOCK, 0)


def _member(group: Watched, index: int, rank: int) -> Member | None:
    address = group.addresses.get(rank)
    note = group.notes.others.get(index, "")
    if address is None:
        return Member(rank, note=note) if note else None
    if not groups.is_here(address):
        return Member(rank, note=note, is_here=False)
    seen = groups.peer(address).read()
    return Member(rank, seen, Facts(state_of(address.pid, address.born)), note)


def _stack_of(them: Snapshot) -> list[Frame]:
    signal, fd = them.stack_signal, them.stack_file
    if not signal:
        return []
    watched = time.monotonic_ns() - them.seen_ns <= FRESH_NS
    return ask(them.pid, them.born, signal, fd, watched=watched, patience_s=_PATIENCE_S)


def _may_have_come(stall: Stall) -> bool:
    """Returns whether a wait has ended because the others came, and not because it failed."""
    for absence in stall.roots:
        them = absence.member.board
        if absence.cause in (Cause.DEAD, Cause.OUT_OF_MEMORY, Cause.EXITING):
            return False
        if them is not None and state_of(them.pid, them.born).kind in (Kind.GONE, Kind.ZOMBIE):
            return False
    return bool(stall.roots)


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
                self._thread = threading.Thread(
                    target=self._run, args=(watcher,), name="fastddp watch", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """Ends the thread: it must not be in a store when the interpreter takes itself apart."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        self.clerk.stop()

    def _run(self, watcher: Watcher) -> None:
        while not self._stop.wait(watcher.tick_s):
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
    """
    if groups.watch_group(name, ranks, index, store):
        own_board = board.own()
        if own_board is not None:
            _thread.start(own_board)


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

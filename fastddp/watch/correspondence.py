"""What goes through the stores of groups: addresses of boards, notes, questions and answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

from fastddp.watch.clerk import Clerk
from fastddp.watch.describe import describe_wait
from fastddp.watch.groups import Watched
from fastddp.watch.meeting_points import absent_from, waits_of
from fastddp.watch.snapshot import Snapshot, WaitSeen
from fastddp.watch.timing import Timing
from fastddp.watch.view import View

_NOTE_AFTER_S = 1.0
_ANSWER_EVERY_S = 5.0
_MAX_PAUSE_S = 60.0
_MAX_STRANGERS = 16
_ASKS_EARLY = 64
"""In groups of at most that many ranks, boards are looked for before anybody waits."""


class Correspondence:
    """Decides what the clerk asks and tells the stores.

    Args:
        clerk: the thread that asks stores.
        timing: the pace of the watcher.
        about_me: returns what this process does, for ranks of other hosts.
    """

    def __init__(self, clerk: Clerk, timing: Timing, about_me: Callable[[], str]) -> None:
        self._clerk = clerk
        self._timing = timing
        self._about_me = about_me

    def exchange(self, watched: Sequence[Watched], mine: Snapshot, now_ns: int) -> None:
        """Reads addresses, notes and questions, and leaves a note, as it is time.

        Args:
            watched: the groups that the script has.
            mine: what the board of this process says.
            now_ns: the time by the clock of boards.
        """
        waits = waits_of(mine)
        for group in watched:
            if not group.is_known:
                self._look_for_addresses(group, bool(waits), now_ns)
            note = self._note(group, mine, waits, now_ns) if group.has_strangers else ""
            if note:
                self._clerk.ask(f"notes {group.name}", group.read_notes)
            if group.notes.want(note):
                self._clerk.ask(f"note {group.name}", group.write_note)
            if group.spans_hosts:
                self._look_for_questions(group, now_ns)

    def _note(self, group: Watched, mine: Snapshot, waits: Sequence[WaitSeen], now_ns: int) -> str:
        patience_ns = 1e9 * self._timing.soon_s(_NOTE_AFTER_S)
        for wait in waits:
            if wait.group == group.id and now_ns - wait.since_ns >= patience_ns:
                return describe_wait(wait, mine)
        return ""

    def _look_for_addresses(self, group: Watched, is_waiting: bool, now_ns: int) -> None:
        """Reads addresses, ever more rarely if nobody waits: a rank that is off has none."""
        is_due = len(group.ranks) <= _ASKS_EARLY and now_ns >= group.addresses_due_ns
        if is_waiting or is_due:
            group.addresses_due_ns = now_ns + int(1e9 * group.addresses_pause_s)
            group.addresses_pause_s = min(2 * group.addresses_pause_s, _MAX_PAUSE_S)
            self._clerk.ask(f"addresses {group.name}", group.read_addresses)

    def _look_for_questions(self, group: Watched, now_ns: int) -> None:
        period_s = min(_ANSWER_EVERY_S, self._timing.stall_s / 2)
        period_s *= 1 + len(group.ranks) // _ASKS_EARLY
        if now_ns - group.looked_for_questions_ns > 1e9 * period_s:
            group.looked_for_questions_ns = now_ns
            self._clerk.ask(f"answer {group.name}", partial(group.answer, self._about_me))

    def ask_strangers(
        self, watched: Sequence[Watched], view: View, waits: Collection[WaitSeen]
    ) -> None:
        """Asks the ranks of other hosts that are missing what they do instead.

        Args:
            watched: the groups that the script has.
            view: what is known of the ranks.
            waits: the waits of this process that have lasted for long enough to ask.
        """
        for group in watched:
            if not group.spans_hosts:
                continue
            absent = {
                rank
                for wait in waits
                if wait.group == group.id
                for rank in absent_from(view, view.me, wait)
                if view.board(rank) is None
            }
            strangers = [index for index, rank in enumerate(group.ranks) if rank in absent]
            if strangers:
                about = tuple(wait.key for wait in waits if wait.group == group.id)
                ask = partial(group.ask, strangers[:_MAX_STRANGERS], about)
                self._clerk.ask(f"ask {group.name}", ask)

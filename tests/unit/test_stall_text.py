"""What is said of a stall, by hand-made boards: one case for each cause."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from fastddp.watch import names, text
from fastddp.watch.deadlock import deadlock
from fastddp.watch.frames import Frame
from fastddp.watch.layout import Ending, Source, id_of
from fastddp.watch.loops import is_after_loop_of
from fastddp.watch.meeting_points import waits_of
from fastddp.watch.process import Kind, State
from fastddp.watch.stall import judge
from tests.unit.boards import (
    AT_LOADER,
    NET,
    NOW_NS,
    STATE,
    WORLD,
    Rank,
    model,
    view,
    wait,
)

A, B = id_of("a"), id_of("b")
PLACE = Frame("/home/me/train.py", 31, "main")
WAITING = Rank([wait(bucket=1, missing=[1])], [model(steps=5, phase=1)])
BARRIER = wait(Source.SCRIPT, number=0, text="barrier on group '0'")
WAIT_TEXT = "the all-reduce of bucket 1 of model 'Net' (head.bias, head.weight and 1 more), step 6"
FIRST = f"fastddp: rank 0 has waited for 12 s in {WAIT_TEXT}, at /home/me/train.py:31 in main"


@pytest.fixture(autouse=True)
def net(monkeypatch: pytest.MonkeyPatch) -> None:
    params = ["body.weight", "head.weight", "head.bias"]
    known = names.ModelNames("model 'Net'", params, lambda: [[2, 1, 0]])
    monkeypatch.setattr(names, "_models", {(NET, WORLD): known})


def said(
    *others: Rank, first: Rank = WAITING, groups: Mapping[int, Sequence[int]] | None = None
) -> list[str]:
    seen = view(first, *others, groups=groups)
    stall = judge(seen, 0, waits_of(seen.board(0))[0], 12.0)
    return text.stall_lines(stall, seen, PLACE)


CASES: dict[str, tuple[Rank, str, str]] = {
    "sleep in the loader": (
        Rank(models=[model(steps=5)], frames=AT_LOADER),
        "sleeping in the kernel (hrtimer_nanosleep), at /home/me/loader.py:12 in __getitem__,"
        " called from /home/me/train.py:28 in main",
        "the input of rank 1 is slow; next: look at its data set",
    ),
    "loader workers": (
        Rank(frames=AT_LOADER, workers=[STATE[Kind.DISK], STATE[Kind.DISK], STATE[Kind.GONE]]),
        "its 3 data loader workers: 2 waiting in the kernel for a disk, a network file or a driver,"
        " not to be interrupted, 1 gone",
        "the input of rank 1 is slow",
    ),
    "SIGSTOP": (
        Rank(state=STATE[Kind.STOPPED], frames=()),
        "stopped by a signal (SIGSTOP or Ctrl-Z)",
        "rank 1 was stopped from outside; next: continue it",
    ),
    "SIGKILL": (
        Rank(state=State(Kind.ZOMBIE, "", -9), frames=()),
        "dead, killed by SIGKILL",
        "rank 1 has died; next: look at the end of its output",
    ),
    "exception": (
        Rank(state=State(Kind.ZOMBIE, "", 1), frames=()),
        "dead, with exit code 1",
        "rank 1 has died",
    ),
    "out of memory": (
        Rank(state=State(Kind.ZOMBIE, "", -9), frames=(), killed_for_memory=True),
        "it is dead, and the system has killed a process for want of memory",
        "rank 1 was killed because memory ran out",
    ),
    "early exit": (
        Rank(models=[model(steps=5)], ending=Ending.EXITING, frames=()),
        "its script has ended, and Python is exiting",
        "rank 1 left the training loop after step 5: it has fewer batches; next: give all ranks",
    ),
    "extra collective": (
        Rank([BARRIER], [model(steps=5)]),
        "it waits in the script's own barrier on group '0', at /home/me/train.py:40 in main, for"
        " rank 0",
        "rank 1 has left the training loop after step 5, or is alone in calling barrier; next: ",
    ),
    "missing backward": (
        Rank([wait(number=10, missing=[0], text="the broadcast before forward")], [model(5)]),
        "it waits in the broadcast before forward, at /home/me/train.py:40 in main, for rank 0",
        "rank 1 has begun another forward after step 5, without the backward that rank 0 is in;",
    ),
    "different branch": (
        Rank([wait(bucket=1, owner=8, missing=[0])]),
        "it waits in the all-reduce of bucket 1 of a model, at",
        "the ranks run backwards of different models; next: have all ranks take the same branches",
    ),
    "GIL held": (
        Rank(seen_s_ago=11.0),
        "sleeping in the kernel (hrtimer_nanosleep), in a call that holds Python's lock (the GIL),"
        " at /home/me/train.py:40 in main",
        "a call on rank 1 does not return, and keeps",
    ),
    "slow rank": (
        Rank(cpu_share=0.87, models=[model(5, phase=1, last_param=2)]),
        "it computes (87 % of a core), at /home/me/train.py:40 in main; in the backward of step 6,"
        " last gradient: head.weight",
        "rank 1 has more work than the others",
    ),
    "stuck in backward": (
        Rank(models=[model(5, phase=1)]),
        "sleeping in the kernel (hrtimer_nanosleep), at /home/me/train.py:40 in main; in the"
        " backward of step 6, no gradient yet",
        "rank 1 is stuck in its backward; next: look at that line",
    ),
    "sleep in the script": (
        Rank(),
        "sleeping in the kernel (hrtimer_nanosleep), at /home/me/train.py:40 in main",
        "rank 1 waits for something that is not a collective",
    ),
    "another host": (
        Rank(has_board=False, is_here=False),
        "it is on another host, and has not answered what it does",
        "rank 1 is slow, or does not call the same collectives",
    ),
    "a thread that has not ended": (
        Rank(models=[model(steps=5)], frames=[Frame(threading.__file__, 1560, "_shutdown")]),
        "its script has ended, and Python is exiting",
        "rank 1 left the training loop after step 5: it has fewer batches",
    ),
    "a computing rank of another host": (
        Rank(has_board=False, is_here=False, answer="BUSY it computes (98 % of a core), at a.py:1"),
        "it is on another host; it computes (98 % of a core), at a.py:1",
        "rank 1 has more work than the others",
    ),
    "a sleeping rank of another host": (
        Rank(has_board=False, is_here=False, answer="INPUT sleeping in the kernel, at a.py:1"),
        "it is on another host; sleeping in the kernel, at a.py:1",
        "the input of rank 1 is slow",
    ),
    "a strange answer of another host": (
        Rank(has_board=False, is_here=False, answer="DEAD and more"),
        "it is on another host; and more",
        "rank 1 is slow, or does not call the same collectives",
    ),
    "a note of another host": (
        Rank(has_board=False, is_here=False, note="a call"),
        "it waits in a call",
        "the ranks take different branches",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cause_is_told(case: str) -> None:
    rank, doing, reason = CASES[case]
    first, missing, likely = said(rank)
    assert first == FIRST
    assert missing.startswith("  rank 1 has not come: "), missing
    assert doing in missing, missing
    assert likely.startswith(f"  likely: {reason}"), likely


def test_what_a_rank_answers() -> None:
    busy = Rank(models=[model(steps=5)], cpu_share=0.9)
    at = "at /home/me/train.py:40 in main"
    assert text.answer_text(busy.member(1), NOW_NS) == (
        f"BUSY it computes (90 % of a core), {at}; 5 steps done"
    )
    there = Rank([BARRIER], models=[model(steps=5)])
    assert text.answer_text(there.member(1), NOW_NS) == (
        f"ELSEWHERE it waits in the script's own barrier on group '0', {at}; 5 steps done"
    )
    asks = Rank(models=[model(steps=5, phase=1)])
    assert text.answer_text(asks.member(1), NOW_NS) == (
        f"SLEEPS sleeping in the kernel (hrtimer_nanosleep), {at}; in the backward of step 6, no"
        " gradient yet; 5 steps done"
    )


@pytest.mark.parametrize(
    ("rank", "is_unknown", "is_busy"),
    [
        (Rank(has_board=False), True, False),
        (Rank(has_board=False, is_here=False), True, False),
        (Rank(has_board=False, is_here=False, answer="BUSY at a.py:1"), False, True),
        (Rank(has_board=False, is_here=False, answer="SLEEPS at a.py:1"), False, False),
        (Rank(has_board=False, is_here=False, note="a call"), False, False),
        (Rank(), False, False),
    ],
)
def test_of_whom_nothing_is_known_and_who_computes(
    rank: Rank, is_unknown: bool, is_busy: bool
) -> None:
    seen = view(WAITING, rank)
    stall = judge(seen, 0, waits_of(seen.board(0))[0], 12.0)
    assert (stall.is_of_unknown, stall.is_busy) == (is_unknown, is_busy)


def test_who_waits_too_and_who_is_missing_is_listed_shortly() -> None:
    first = Rank([wait(bucket=1, missing=[1, 3, 4, 5, 6, 7])], WAITING.models)
    there = Rank(first.waits)
    others = [Rank(frames=[Frame("/home/me/train.py", line, "main")]) for line in range(5)]
    lines = said(Rank(), there, Rank(), *others[1:], first=first)
    assert lines[1] == "  waiting too: rank 2"
    assert lines[2].startswith("  ranks 1 and 3 have not come: sleeping in the kernel")
    assert lines[-2] == "  not there either: rank 7"
    assert len(lines) == 8


def test_two_groups_crossed() -> None:
    groups = {A: [0, 1], B: [0, 1]}
    first = Rank([wait(group=A, number=3, missing=[1], text="collective 3 of a")])
    second = Rank([wait(group=B, number=5, missing=[0], text="collective 5 of b")])
    seen = view(first, second, groups=groups)
    message = text.deadlock_text(deadlock(seen, 10_000_000_000), seen)
    assert message == (
        "the ranks wait for each other in different collectives, and none of them can ever go on:"
        " rank 0 waits in collective 3 of a, at /home/me/train.py:40 in main; rank 1 waits in"
        " collective 5 of b, at /home/me/train.py:40 in main. Likely the ranks take different"
        " branches; next: have all ranks call the same collectives in the same order"
    )


def test_the_end_of_a_stall_is_told() -> None:
    seen = view(WAITING, Rank(state=STATE[Kind.STOPPED]))
    stall = judge(seen, 0, waits_of(seen.board(0))[0], 12.0)
    assert (
        text.end_line(stall, 31.4) == "fastddp: the wait of rank 0 is over after 31 s; rank 1 came"
        " last"
    )


def test_who_is_missing_in_an_error() -> None:
    seen = view(WAITING, Rank(), Rank([BARRIER]), Rank())
    assert text.missing_text({rank: text.where(seen, rank) for rank in (1, 2, 3)}) == (
        "rank 2 waits in the script's own barrier on group '0'; ranks 1 and 3 not there yet; do all"
        " ranks call it?"
    )


# ---- loops ---------------------------------------------------------------------------------------

SCRIPT = """\
def helper():
    for _ in range(3):
        pass
def main():
    before()
    for epoch in range(2):
        for batch in batches:
            step()
        evaluate()
    after()
for _ in range(2):
    main()
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.mark.parametrize(
    ("place", "function", "answer"),
    [
        (10, "main", True),
        (9, "main", False),
        (5, "main", False),
        (8, "main", False),
        (3, "helper", None),
    ],
)
def test_what_comes_after_a_loop(
    script: str, place: int, function: str, answer: bool | None
) -> None:
    in_loop = Frame(script, 8, "main")
    assert is_after_loop_of(Frame(script, place, function), in_loop) is answer


def test_what_is_not_in_a_loop_has_none_behind_it(script: str) -> None:
    assert is_after_loop_of(Frame(script, 10, "main"), Frame(script, 5, "main")) is None
    gone = [Frame("/nowhere/train.py", line, "main") for line in (9, 8)]
    assert is_after_loop_of(*gone) is None


def test_a_rank_that_has_left_the_loop_is_told_so(script: str) -> None:
    there = Rank([BARRIER], [model(steps=5)], frames=[Frame(script, 10, "main")])
    seen = view(WAITING, there)
    stall = judge(seen, 0, waits_of(seen.board(0))[0], 12.0)
    likely = text.stall_lines(stall, seen, Frame(script, 8, "main"))[-1]
    assert likely.startswith("  likely: rank 1 left the training loop after step 5: it has fewer")
    inside = view(WAITING, Rank([BARRIER], frames=[Frame(script, 9, "main")]))
    stall = judge(inside, 0, waits_of(inside.board(0))[0], 12.0)
    likely = text.stall_lines(stall, inside, Frame(script, 8, "main"))[-1]
    assert likely.startswith("  likely: rank 1 is alone in calling barrier on group '0'; next: ")


def test_a_rank_that_has_left_the_loop_while_another_one_begins_a_forward(script: str) -> None:
    forward = wait(Source.NAMED, number=0, text="the broadcast before forward")
    after, inside = (Rank([BARRIER], frames=[Frame(script, line, "main")]) for line in (10, 8))
    here = Rank([forward], frames=[Frame(script, 8, "main")])
    for first, second, left in [(here, after, 1), (after, here, 0)]:
        seen = view(first, second)
        message = text.deadlock_text(deadlock(seen, 10_000_000_000), seen)
        assert f"Likely rank {left} left the training loop: it has fewer batches" in message
    seen = view(here, inside)
    message = text.deadlock_text(deadlock(seen, 10_000_000_000), seen)
    assert "Likely rank 1 is alone in calling barrier on group '0'" in message


def test_the_same_broadcast_in_two_groups_has_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_groups", {A: "a", B: "b"})
    first, second = (
        Rank([wait(Source.NAMED, group=group, number=0, text="the broadcast before forward")])
        for group in (A, B)
    )
    seen = view(first, second, groups={A: [0, 1], B: [0, 1]})
    message = text.deadlock_text(deadlock(seen, 10_000_000_000), seen)
    for rank, group in enumerate("ab"):
        assert f"rank {rank} waits in the broadcast before forward on group '{group}', at " in (
            message
        )
    assert "Likely the ranks run different models; next: have all ranks take the same" in message


def test_a_rank_that_is_still_in_the_forward_is_not_ahead(script: str) -> None:
    forward = Rank(
        [wait(Source.NAMED, number=0, text="the broadcast before forward")],
        frames=[Frame(script, 8, "main")],
    )
    backward = Rank([wait(bucket=1, missing=[0, 2])], frames=[Frame(script, 8, "main")])
    left = Rank([BARRIER], [model(steps=5)], frames=[Frame(script, 10, "main")])
    seen = view(forward, backward, left)
    message = text.deadlock_text(deadlock(seen, 10_000_000_000), seen)
    assert "Likely rank 2 left the training loop after step 5: it has fewer batches" in message


def test_a_rank_in_a_forward_of_another_model_is_not_ahead() -> None:
    forward = "the broadcast before forward"
    first = Rank([wait(Source.NAMED, group=A, number=0, text=forward)])
    second = Rank([wait(group=A, bucket=1, missing=[0, 2])])
    third = Rank([wait(Source.NAMED, group=B, number=0, text=forward)])
    seen = view(first, second, third, groups={A: [0, 1, 2], B: [0, 1, 2]})
    message = text.deadlock_text(deadlock(seen, 10_000_000_000), seen)
    assert "Likely the ranks run different models; next: have all ranks take the same" in message

"""Reports: the right figures for recordings that were written by hand."""

from __future__ import annotations

import builtins
import html
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

import fastddp
from fastddp.timeline.chrome import trace_events
from fastddp.timeline.clock import Both, Shift, shift_between
from fastddp.timeline.command import write_report
from fastddp.timeline.figures import figure
from fastddp.timeline.matched import Last, find_last, match, note_launches
from fastddp.timeline.page import page
from fastddp.timeline.parts import Part, parts_of, tells_lateness
from fastddp.timeline.picture import draw
from fastddp.timeline.recording import Recording, Stall, Step
from fastddp.timeline.report import Report
from fastddp.timeline.run import make_run, read_run
from fastddp.timeline.spans import Span, covered, gaps, merged
from fastddp.timeline.steps import read_steps
from fastddp.watch import events
from fastddp.watch.events import Kind
from fastddp.watch.ring_reader import parse
from tests.rings import MS, OWNER, Words, by_time, meeting, ring, step


def record(*parts: Sequence[Words]) -> Recording:
    return read_steps(parse(ring(by_time(*parts))).events())


def in_ms(parts: Mapping[Part, int]) -> dict[Part, float]:
    return {part: ns / MS for part, ns in parts.items() if ns}


def report_of(by_rank: Mapping[int, Sequence[Words]], **header: Any) -> Report:
    rings = {
        rank: parse(ring(by_time(events), rank=rank, **header)) for rank, events in by_rank.items()
    }
    return Report.of(make_run(rings))


def late_run(late: int = 41, steps: int = 20) -> dict[int, list[Words]]:
    """Returns two ranks of which rank 1 begins its forward 38 ms late, and is slower by the rest.

    A step takes 100 ms: 10 forward, 20 backward, on rank 0 `late` of waiting and 5 of transfer, 3
    optimizer; the rest lies before the forward.
    """
    ranks: dict[int, list[Words]] = {0: [], 1: []}
    for number in range(steps):
        at = 1 + 100 * number
        slow = late - 38
        ranks[0] += step(number, at, exposed=late + 5, launched=[5, 20])
        ranks[1] += step(number, at + 38, backward=20 + slow, launched=[5, 20 + slow])
    return ranks


# ---- spans ---------------------------------------------------------------------------------------


def test_spans_are_merged_and_gaps_found() -> None:
    spans = [Span(5, 7), Span(1, 3), Span(2, 4), Span(7, 8), Span(9, 9)]
    assert merged(spans) == [Span(1, 4), Span(5, 8)]
    assert covered(spans) == 6
    assert gaps(spans, Span(0, 10)) == [Span(0, 1), Span(4, 5), Span(8, 10)]
    assert gaps([], Span(0, 2)) == [Span(0, 2)]
    assert gaps([Span(0, 5)], Span(1, 4)) == []


# ---- steps and their parts -----------------------------------------------------------------------


def test_the_parts_of_a_step_add_up_to_it() -> None:
    first, second = record(step(0, 1), step(1, 51)).steps
    assert first.begin is None
    assert in_ms(parts_of(first)) == {
        Part.FORWARD: 10,
        Part.BACKWARD: 20,
        Part.TRANSFER: 5,
        Part.OPTIMIZER: 3,
    }
    assert in_ms(parts_of(second)) == {**in_ms(parts_of(first)), Part.OTHER: 12}
    assert sum(parts_of(second).values()) == 50 * MS


def test_what_is_between_the_round_and_the_optimizer_is_the_scripts() -> None:
    clipping = [(40 * MS, Kind.OPTIMIZER_BEGIN, 0, 0, 0), (42 * MS, Kind.OPTIMIZER_END, 0, 0, 0)]
    (found,) = record(step(0, 1, optimizer=0), clipping).steps
    assert found.end == 42 * MS
    assert in_ms(parts_of(found))[Part.OTHER] == 4


def test_forwards_without_a_round_are_told_apart() -> None:
    def forward(at: int) -> list[Words]:
        return [
            (at * MS, Kind.FORWARD_BEGIN, OWNER, 1, 0),
            ((at + 6) * MS, Kind.FORWARD_END, OWNER, 0, 0),
        ]

    _, found = record(step(0, 1), forward(50), forward(70), step(1, 90)).steps
    parts = in_ms(parts_of(found))
    assert (parts[Part.OTHER], parts[Part.EARLIER], parts[Part.FORWARD]) == (11, 40, 10)
    assert found.forwards == [Span(50 * MS, 56 * MS), Span(70 * MS, 76 * MS)]


def test_a_round_without_a_forward_begins_with_its_backward() -> None:
    events = [event for event in step(0, 1) if event[1] not in (1, 2)]
    (found,) = record(events).steps
    assert found.forward == found.backward == 11 * MS


def test_exposed_communication_is_waiting_until_the_ranks_have_met() -> None:
    # Backward ends at 31, the round at 51. The first collective met during backward; the second
    # one meets at 43 and is over at 46; the third meets at 48.
    meetings = [
        *meeting(0, 20, 25, 28, last=1, by=5),
        *meeting(1, 31, 43, 46, last=1, by=12),
        *meeting(2, 46, 48, 51, last=1, by=2),
    ]
    (found,) = record(step(0, 1, exposed=20), meetings).steps
    assert in_ms(parts_of(found))[Part.LATE] == 14
    assert in_ms(parts_of(found))[Part.TRANSFER] == 6
    assert [m.num_bytes for m in found.meetings] == [1000] * 3


def test_exposed_communication_is_waiting_until_the_last_rank_has_launched() -> None:
    one, other = (
        record(step(0, at, exposed=exposed, launched=[10, 20])).steps[0]
        for at, exposed in ((1, 20), (13, 8))
    )
    note_launches({0: one})
    assert not tells_lateness(one)
    note_launches({0: one, 1: other})
    assert [launch.met for launch in one.launches] == [33 * MS, 43 * MS]
    assert in_ms(parts_of(one))[Part.LATE] == 12
    assert in_ms(parts_of(one))[Part.TRANSFER] == 8
    assert Part.LATE not in in_ms(parts_of(other))


def test_waiting_for_buffers_in_the_forward_is_exposed_too() -> None:
    script = meeting(8, 5, 6, 7, last=1, by=1, owner=0)
    buffers = meeting(0, 2, 6, 8, last=1, by=4)
    (found,) = record(step(0, 1), script, buffers).steps
    parts = in_ms(parts_of(found))
    assert (parts[Part.FORWARD], parts[Part.LATE], parts[Part.TRANSFER]) == (4, 4, 7)
    assert sum(parts.values()) == 38


def test_a_round_that_was_abandoned_or_has_failed_is_no_step() -> None:
    begun = step(0, 1)[:4]
    failed = [*step(1, 50)[:4], (75 * MS, Kind.ERROR, OWNER, 0, 0), *step(1, 50)[4:]]
    raised = [*step(2, 100, optimizer=0), (135 * MS + 1, Kind.ERROR, OWNER, 0, 0)]
    recording = record(begun, failed, raised, step(3, 150))
    assert [found.number for found in recording.steps] == [3]
    assert recording.errors == [75 * MS, 135 * MS + 1]


def test_two_models_in_turn_have_steps_of_their_own() -> None:
    recording = record(step(0, 1, owner=5), step(0, 50, owner=6), step(1, 100, owner=5))
    assert [(found.owner, found.number) for found in recording.steps] == [(5, 0), (6, 0), (5, 1)]
    assert [found.begin for found in recording.steps] == [None, 39 * MS, 88 * MS]


@pytest.mark.parametrize(
    ("count", "doing"),
    [
        (0, "between steps, after step 3"),
        (1, "in a forward, after step 3"),
        (2, "between a forward and its backward, after step 3"),
        (3, "in the backward of step 4"),
        (4, "waiting for the communication of step 4"),
        (6, "in an optimizer step after step 4"),
        (7, "between steps, after step 4"),
    ],
)
def test_it_is_known_where_a_recording_ended(count: int, doing: str) -> None:
    recording = record(step(3, 1), step(4, 100)[:count])
    assert recording.doing == doing
    assert len(recording.unfinished) == (count in (3, 4))


# ---- who was last --------------------------------------------------------------------------------


def steps_of(**ranks: Sequence[Words]) -> dict[int, Step]:
    return {int(name[1:]): record(events).steps[0] for name, events in ranks.items()}


def test_the_last_rank_and_where_it_lost_its_time() -> None:
    steps = steps_of(
        r0=step(0, 1), r1=step(0, 31, forward=14, backward=21), r2=step(0, 11, backward=9)
    )
    assert find_last(steps, 3) == Last(1, 36 * MS, 20 * MS, 4 * MS, 12 * MS)


def test_one_rank_knows_the_last_from_what_it_waited_for() -> None:
    meetings = [*meeting(0, 20, 29, 30, last=2, by=9), *meeting(1, 31, 39, 41, last=1, by=8)]
    assert find_last(steps_of(r0=by_time(step(0, 1, exposed=10), meetings)), 3) == Last(1, 8 * MS)
    # Where it waited for nothing it was the last itself.
    own = by_time(step(0, 1), meeting(0, 30, 30, 33, last=0, by=7))
    assert find_last(steps_of(r0=own), 2) == Last(0, 7 * MS)
    assert find_last(steps_of(r0=step(0, 1)), 2) is None


def test_a_rank_can_be_late_to_what_comes_before_the_round() -> None:
    # Buffers are broadcast in the forward: that is where rank 0 waits, and then both go on.
    steps = steps_of(
        r0=by_time(step(0, 1, forward=50), meeting(0, 2, 40, 41, last=1, by=38)),
        r1=by_time(step(0, 37, forward=14), meeting(0, 40, 40, 41, last=1, by=38)),
    )
    assert find_last(steps, 2) == Last(1, 38 * MS, 36 * MS, 2 * MS, 0)


def test_ranks_of_groups_of_their_own_are_not_compared() -> None:
    def of_group(at: int, group: int) -> Recording:
        together = meeting(0, at + 20, at + 20, at + 30, last=0, by=1, group=group)
        return record(step(0, at), together)

    recordings = {0: of_group(1, 7), 1: of_group(900, 8), 2: of_group(3, 7), 3: record(step(0, 2))}
    assert [list(steps) for steps in match(recordings)] == [[3], [0, 2], [1]]
    del recordings[1]  # then the third one may be on another host, without shared memory
    assert [list(steps) for steps in match(recordings)] == [[0, 2, 3]]


def test_the_last_rank_is_found_whatever_its_group_calls_it() -> None:
    steps = steps_of(
        r4=by_time(step(0, 1, forward=50), meeting(0, 2, 40, 41, last=1, by=38)),
        r6=by_time(step(0, 37, forward=14), meeting(0, 40, 40, 41, last=1, by=38)),
    )
    last = find_last(steps, 8)
    assert last is not None
    assert (last.rank, last.by) == (6, 38 * MS)


# ---- figures -------------------------------------------------------------------------------------


def test_figures() -> None:
    found = figure([n * MS for n in range(1, 101)])
    assert (found.median, found.p95, found.trend) == (50.5, 95.0, 50.0)
    assert figure([MS] * 7).trend is None
    assert figure([3 * MS] * 4 + [MS] * 4).trend == -2.0


def test_the_report_of_a_late_rank() -> None:
    report = report_of(late_run())
    text = " ".join(str(report).split())
    assert (
        "A step would be at most 5.00 ms (5.0 %) shorter if communication took no time, and at"
        " most 41.0 ms (41.0 %) if no rank was late. Rank 1 was last in 100 % of steps, by 41.0 ms"
        " at the median; 38.0 ms of that before its forward began."
    ) in text
    (model,) = report.as_dict()["models"]
    assert model["ranks"][0]["waiting for late ranks"]["median"] == 41
    assert model["ranks"][0]["transfer"]["median"] == 5
    assert "waiting for late ranks" not in model["ranks"][1]
    assert model["average_of_ranks"]["waiting for late ranks"]["median"] == 20.5
    assert (model["first_step"], model["last_step"]) == (0, 19)
    assert model["average_of_ranks"]["step"] == {"median": 100, "p95": 100, "trend": 0}
    json.dumps(report.as_dict())


def test_ranks_that_keep_step_are_not_accused() -> None:
    ranks = {rank: [e for n in range(9) for e in step(n, 1 + 50 * n)] for rank in range(2)}
    assert "was last in" not in str(report_of(ranks))
    ranks[1] = [(at + 100_000, *rest) for at, *rest in ranks[1]]  # a tenth of a millisecond
    assert "No rank was late to speak of" in str(report_of(ranks))


def test_one_rank_alone_says_what_it_does_not_know() -> None:
    text = str(report_of({0: late_run()[0]}))
    assert "exposed communication" in text
    assert "Which rank was last is not known from one rank" in text
    assert "A step would be" not in text
    alone = str(report_of({0: late_run()[0]}, world_size=1))
    assert "last" not in alone.split("\n\n", 1)[1]


def test_a_report_of_nothing() -> None:
    assert str(report_of({0: []})) == (
        "fastddp report: rank 0 of 2: no events\n\nRank 0 has recorded nothing."
    )
    assert report_of({0: []}).as_dict()["models"] == []


def test_two_models_have_tables_of_their_own() -> None:
    events = [e for n in range(5) for o in (5, 6) for e in step(n, 1 + 100 * n + 40 * o, owner=o)]
    text = str(report_of({0: events}))
    assert "model 1 (steps 0 to 4)" in text
    assert "model 2 (steps 0 to 4)" in text


def test_trouble_is_told() -> None:
    ranks = late_run()
    ranks[0] += [
        (2100 * MS, Kind.STALL_BEGIN, 0, 1, 0),
        (9100 * MS, Kind.STALL_END, 0, 1, 7000 * MS),
        (9200 * MS, Kind.ERROR, 0, 0, 0),
        (9300 * MS, Kind.INTERRUPTED, 0, 0, 0),
    ]
    ranks[1] += step(20, 2001)[:3]
    text = " ".join(str(report_of(ranks, world_size=3)).split())
    assert "Rank 1 was waited for once as a stall, at most 7.0 s." in text
    assert "Rank 0: a wait ended with an error, first 0.1 s before the end" in text
    assert "Rank 0: a wait ended with a signal, first 0.0 s before the end" in text
    assert "rank 1 ends 7.3 s before the last one, in the backward of step 20." in text
    assert "There is no recording of 1 rank: 2." in text


def test_the_end_of_a_stall_tells_its_begin_and_its_rank() -> None:
    recording = record(
        step(0, 1),
        [
            (12_000 * MS, Kind.STALL_BEGIN, OWNER, 2, 0),
            (15_000 * MS, Kind.STALL_END, OWNER, 1, 13_000 * MS),
            (16_000 * MS, Kind.STALL_END, OWNER, 1, 2**63),
            (30_000 * MS, Kind.STALL_BEGIN, OWNER, 3, 0),
        ],
    )
    assert recording.stalls == [
        Stall(1, 2_000 * MS, 15_000 * MS),
        Stall(1, 1 * MS, 16_000 * MS),
        Stall(3, 30_000 * MS, None),
    ]


def test_of_many_ranks_the_late_ones_are_shown() -> None:
    ranks = {
        rank: [e for n in range(9) for e in step(n, 1 + 100 * n + (9 if rank == 99 else 0))]
        for rank in range(100)
    }
    text = str(report_of(ranks, world_size=100))
    assert "rank 99 " in text
    assert len(text.splitlines()) < 50


# ---- clocks --------------------------------------------------------------------------------------


def two_hosts(shift: int, late: int) -> dict[int, bytes]:
    """Returns the rings of a late run whose second host's clock and date are wrong."""
    ranks = late_run(late)
    moved = [(at - shift, *rest) for at, *rest in ranks[1]]
    return {
        0: ring(ranks[0], rank=0, host=1, made_ns=0, made_epoch_ns=10**18),
        1: ring(moved, rank=1, host=2, made_ns=0, made_epoch_ns=10**18 + shift + 3000 * MS),
    }


@pytest.mark.parametrize("shift", [-500 * MS, 0, 27 * MS])
def test_hosts_are_put_on_one_clock_by_what_they_did_together(shift: int) -> None:
    run = make_run({rank: parse(data) for rank, data in two_hosts(shift, 41).items()})
    assert run.hosts[1].shift.ns == shift
    # Rank 1 is always the last to launch, so a collective bounds its clock in one direction by the
    # 5 ms of the transfer, and in the other one by the 46 ms that rank 0 waited.
    assert run.hosts[1].shift.error_ns == 46 * MS
    assert run.recordings[1].steps[0].forward == 39 * MS
    assert next(iter(run.events(1))).at == 39 * MS
    text = str(Report.of(run))
    assert "Rank 1 was last in 100 % of steps, by 41.0 ms" in text
    assert "The clock of the host of rank 1 is known to within 46.0 ms" in text


def test_bounds_of_a_shift() -> None:
    # The second host is behind by 100; each host is once the last to launch.
    together = [Both((10, -95), (20, -80)), Both((30, -60), (50, -50))]
    assert shift_between(together, 7) == Shift(100, 10)
    assert shift_between([], 7) == Shift(7, None)
    contradiction = [Both((10, 110), (5, 105)), Both((10, -90), (5, -95))]
    assert shift_between(contradiction, 7) == Shift(7, None)


def test_hosts_that_did_nothing_together_go_by_their_dates() -> None:
    rings = {
        0: parse(ring(step(0, 1), rank=0, host=1, made_epoch_ns=10**18)),
        1: parse(ring(step(5, 1), rank=1, host=2, made_epoch_ns=10**18 + 30 * MS)),
    }
    run = make_run(rings)
    assert run.hosts[1].shift == Shift(30 * MS, None)
    assert "rest on the hosts' dates" in str(Report.of(run))


# ---- directories ---------------------------------------------------------------------------------


def leave(
    directory: Path, by_rank: Mapping[int, Sequence[Words]], pid: int = 1, **header: Any
) -> None:
    for rank, recorded in by_rank.items():
        path = directory / f"rank-{rank}.{pid}.ring"
        path.write_bytes(ring(recorded, rank=rank, **header))


def test_a_directory_gives_text_trace_picture_and_page(tmp_path: Path) -> None:
    leave(tmp_path, late_run())
    text = write_report(tmp_path)
    assert "Rank 1 was last in 100 % of steps" in text
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in trace} == {0, 1}
    picture = tmp_path / "timeline.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(picture.read_bytes()[16:20], "big") == 1200
    page = (tmp_path / "report.html").read_text()
    assert "waiting for late ranks" in page
    assert "data:image/png;base64,iVBOR" in page


def test_without_matplotlib_all_but_the_picture_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    leave(tmp_path, late_run())
    assert "No picture: matplotlib, which draws it, is not installed" in write_report(tmp_path)
    assert "No picture: matplotlib" in html.unescape((tmp_path / "report.html").read_text())
    assert not (tmp_path / "timeline.png").exists()
    assert (tmp_path / "trace.json").exists()


def test_what_is_not_of_the_latest_run_is_left_out_and_named(tmp_path: Path) -> None:
    date = 10**18
    earlier = {"made_ns": 0, "made_epoch_ns": date}
    later = {"made_ns": 10**12, "made_epoch_ns": date + 10**12, "world_size": 4}
    leave(tmp_path, late_run(), **earlier)
    leave(tmp_path, {0: [], 1: [], 2: []}, pid=2, **later)
    leave(tmp_path, {3: step(0, 1)}, world_size=4, **earlier)
    (tmp_path / "rank-unknown.9.ring").write_bytes(ring([], rank=None))
    (tmp_path / "rank-<b>.9.ring").write_bytes(b"x")
    run = read_run(tmp_path)
    assert list(run.rings) == [0, 1, 2]
    assert [text.split(":")[0] for text in run.left_out] == [
        "rank-<b>.9.ring",
        "rank-0.1.ring",
        "rank-1.1.ring",
        "rank-3.1.ring",
        "rank-unknown.9.ring",
    ]
    report = Report.of(run)
    text = page(run, report.models, None, "<i>")
    assert "rank-&lt;b&gt;.9.ring" in text
    assert "<i>" not in text


def test_a_directory_without_rings_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "rank-0.1.ring").write_bytes(b"no ring")
    with pytest.raises(FileNotFoundError, match=r"FASTDDP_TRACE=.*rank-0\.1\.ring: .* 7 bytes"):
        read_run(tmp_path)


def test_a_single_process_needs_no_rank(tmp_path: Path) -> None:
    (tmp_path / "rank-unknown.9.ring").write_bytes(ring(step(0, 1), rank=None))
    assert "fastddp report: rank 0, steps 0 to 0" in write_report(tmp_path)


def test_the_command_line(tmp_path: Path) -> None:
    leave(tmp_path, late_run())
    command = [sys.executable, "-m", "fastddp", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Rank 1 was last" in done.stdout
    command[-1] = str(tmp_path / "nowhere")
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fastddp: no ring of events")


# ---- the trace -----------------------------------------------------------------------------------


def test_slices_of_a_thread_never_overlap() -> None:
    meetings = [*meeting(0, 15, 20, 45, last=1, by=5), *meeting(1, 18, 25, 40, last=1, by=5)]
    report = report_of({0: by_time(step(0, 1, exposed=20, launched=[4, 8]), meetings)})
    found = [event for event in trace_events(report.run) if event["ph"] == "X"]
    named = {
        (event["pid"], event["tid"])
        for event in trace_events(report.run)
        if event["name"] == "thread_name"
    }
    assert {(event["pid"], event["tid"]) for event in found} == named
    threads: dict[int, list[tuple[float, float]]] = {}
    for event in found:
        threads.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(threads) == 5
    for spans in threads.values():
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_a_round_that_did_not_end_is_in_the_trace() -> None:
    report = report_of(
        {0: [*step(0, 1), *step(1, 50)[:3], (90 * MS, Kind.FILL_BEGIN, OWNER, 0, 0)]}
    )
    names = [(e["name"], e["args"].get("step")) for e in trace_events(report.run) if e["ph"] == "X"]
    assert ("backward", 1) in names


# ---- anything at all -----------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(
        st.one_of(st.integers(1, 60), st.integers(1, 2**62 - 1)),
        st.sampled_from(list(Kind)),
        st.sampled_from([0, OWNER, 5]),
        st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
        st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
    ),
    max_size=80,
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.lists(st.tuples(EVENTS, st.booleans(), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(0, 2**64 - 1),
)
def test_a_report_can_be_made_of_anything(
    ranks: list[tuple[list[Words], bool, int]], made: int
) -> None:
    rings = {}
    for rank, (recorded, trains, host) in enumerate(ranks):
        steps = [event for n in range(3) for event in step(n, 1 + 50 * n, launched=[4])]
        memory = ring(
            by_time(recorded, steps if trains else []), rank=rank, host=host, made_ns=made
        )
        rings[rank] = parse(memory)
    report = Report.of(make_run(rings))
    assert len(str(report)) < 20_000
    json.dumps([report.as_dict(), list(trace_events(report.run))], allow_nan=False)
    assert "<html" in page(report.run, report.models, None, "why")
    for together in report.run.steps:
        for found in together.values():
            assert min(parts_of(found).values()) >= 0


def test_a_step_of_any_length_can_be_drawn() -> None:
    recorded = [*step(0, 1), *step(1, 2**61 // MS), *step(2, 2**61 // MS + 100)]
    report = report_of({0: recorded})
    assert draw(report.run, report.models).startswith(b"\x89PNG")


# ---- in a running process ------------------------------------------------------------------------


def test_a_process_reports_on_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "snapshot", lambda: ring(by_time(late_run()[1]), rank=1))
    report = fastddp.report()
    assert report.as_dict()["ranks"] == [1]
    assert str(report).startswith("fastddp report: rank 1 of 2, steps 0 to 19, the latest 1.9 s\n")

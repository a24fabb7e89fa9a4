"""A trace for the viewers of Chrome's trace event format: https://ui.perfetto.dev and others.

Each rank is a process there and each lane a thread. Slices of a thread may not overlap, so that
collectives which do are spread over several.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastddp.timeline.run import Run
from fastddp.timeline.slices import LANES, Lane, Slice, slices_of

LANES_EACH = 64
"""The numbers of threads that a kind of lane has: more collectives than that never overlap."""


def write_trace(run: Run, path: Path) -> None:
    """Writes the trace of a run.

    Args:
        run: the recordings of the run.
        path: the file to be written, JSON.

    Raises:
        OSError: if it cannot be written.
    """
    with path.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        for event in trace_events(run):
            file.write(separator + json.dumps(event))
            separator = ",\n"
        file.write("\n]}\n")


def trace_events(run: Run) -> Iterator[dict[str, Any]]:
    """Yields the events of the trace; times are microseconds from the first event of the run.

    Args:
        run: the recordings of the run.
    """
    zero = min(recording.first for recording in run.recordings.values())
    host_of = {rank: nth for nth, host in enumerate(run.hosts) for rank in host.ranks}
    for rank, recording in run.recordings.items():
        name = f"rank {rank} (host {host_of[rank]}, process {run.rings[rank].pid})"
        yield _name("process_name", rank, 0, name)
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        slices = sorted(slices_of(recording), key=lambda s: s.span)
        ends: dict[Lane, list[int]] = {lane: [] for lane in Lane}
        for piece in slices:
            lane = LANES[piece.activity]
            before = len(ends[lane])
            thread = _free(ends[lane], piece)
            number = 1 + list(Lane).index(lane) * LANES_EACH + thread
            if thread == before:
                suffix = f" {thread + 1}" if thread else ""
                yield _name("thread_name", rank, number, lane.value + suffix)
            yield {
                "ph": "X",
                "name": piece.activity.value,
                "cat": lane.value,
                "pid": rank,
                "tid": number,
                "ts": (piece.span.begin - zero) / 1e3,
                "dur": piece.span.length / 1e3,
                "args": piece.facts,
            }
        for what, times in (("error", recording.errors), ("signal", recording.interrupted)):
            for at in times:
                yield {"ph": "i", "s": "p", "name": what, "pid": rank, "tid": 0,
                       "ts": (at - zero) / 1e3}  # fmt: skip


def _free(ends: list[int], piece: Slice) -> int:
    """Returns the first thread of a lane in which nothing goes on when a slice begins."""
    for thread, end in enumerate(ends):
        if end <= piece.span.begin or thread == LANES_EACH - 1:
            ends[thread] = piece.span.end
            return thread
    ends.append(piece.span.end)
    return len(ends) - 1


def _name(kind: str, rank: int, thread: int, text: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": {"name": text}}

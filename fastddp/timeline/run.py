"""The recordings of a run: all rings of a directory, on one clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from fastddp.timeline.clock import Shift, done_together, shift_between
from fastddp.timeline.matched import Key, match, note_launches
from fastddp.timeline.recording import Recording, Step
from fastddp.timeline.steps import read_steps
from fastddp.watch import ring_reader
from fastddp.watch.ring_reader import Event, Ring

PATTERN = "*.ring"
DATES_DIFFER_NS = 600 * 10**9
"""By how much the dates of two hosts may differ in recordings that are taken for one run."""


@dataclass(frozen=True)
class Host:
    """Ranks that share a clock."""

    ranks: list[int]
    shift: Shift
    """From the clock of the host to that of the run."""


@dataclass(frozen=True)
class Run:
    """What is known of a run. All times are on the monotonic clock of the first rank's host."""

    rings: dict[int, Ring]
    """By rank, the ranks ascending."""
    recordings: dict[int, Recording]
    hosts: list[Host]
    steps: list[dict[int, Step]]
    """The steps that ranks took together, each by rank, in the order in which they ended."""
    left_out: list[str] = field(default_factory=list)
    """Files that are not part of the run, and why, for people."""

    @property
    def world_size(self) -> int | None:
        """How many ranks the run had; None if no process knew it."""
        return next((ring.world_size for ring in self.rings.values()), None)

    @property
    def missing(self) -> list[int]:
        """The ranks without a recording."""
        return [rank for rank in range(self.world_size or 0) if rank not in self.rings]

    def shift_of(self, rank: int) -> int:
        """Returns what is added to the times in the ring of a rank.

        Args:
            rank: a rank with a recording.
        """
        return next(host.shift.ns for host in self.hosts if rank in host.ranks)

    def events(self, rank: int) -> list[Event]:
        """Returns the events of a rank by time.

        Args:
            rank: a rank with a recording.
        """
        shift = self.shift_of(rank)
        return [event._replace(at=event.at + shift) for event in self.rings[rank].events()]


def read_run(directory: Path) -> Run:
    """Returns the latest run that left its rings in a directory.

    Args:
        directory: the folder that ``FASTDDP_TRACE`` or ``fastddp.trace`` named.

    Raises:
        FileNotFoundError: if there is no ring in it that could be read; says what there is.
    """
    found, left_out = [], []
    for path in sorted(directory.glob(PATTERN)):
        try:
            found.append((path.name, ring_reader.read(path)))
        except (OSError, ValueError) as error:
            left_out.append(f"{path.name}: {error}")
    if not found:
        text = f"no ring of events (*.ring) in {directory}: start the run with FASTDDP_TRACE="
        text += f"{directory}, or call fastddp.trace({str(directory)!r}) in it"
        raise FileNotFoundError("; ".join([text, *left_out]))
    rings, others = _latest(found)
    return make_run(rings, left_out + others)


def _latest(found: list[tuple[str, Ring]]) -> tuple[dict[int, Ring], list[str]]:
    """Returns the rings of the latest run by rank, and why the others are not among them."""
    if len(found) == 1:
        ring = found[0][1]
        return {ring.rank or 0: ring}, []
    rings: dict[int, Ring] = {}
    names: dict[int, str] = {}
    left_out = []
    ranked = [(name, ring) for name, ring in found if ring.rank is not None]
    latest: Ring | None = None
    for name, ring in sorted(ranked, key=lambda pair: -pair[1].made_epoch_ns):
        assert ring.rank is not None
        latest = latest or ring
        if ring.rank in rings:
            left_out.append(f"{name}: {names[ring.rank]} is a later recording of rank {ring.rank}")
        elif ring.world_size != latest.world_size or _is_before(ring, latest):
            left_out.append(f"{name}: it is from an earlier run")
        else:
            rings[ring.rank], names[ring.rank] = ring, name
    left_out += [
        f"{name}: its process did not know its rank" for name, ring in found if ring.rank is None
    ]
    return dict(sorted(rings.items())), left_out


def _is_before(ring: Ring, latest: Ring) -> bool:
    """Returns whether a ring was written to for the last time before another one was made."""
    if not len(ring):
        return False
    end = int(ring.words[-1, 0])
    if ring.host is not None and ring.host == latest.host:
        return end < latest.made_ns
    return ring.epoch_ns(end) < latest.made_epoch_ns - DATES_DIFFER_NS


def make_run(rings: Mapping[int, Ring], left_out: list[str] | None = None) -> Run:
    """Returns recordings on one clock.

    Args:
        rings: the rings of one run by rank, at least one.
        left_out: the files that are not part of the run, for people.
    """
    by_host: dict[object, list[int]] = {}
    for rank, ring in sorted(rings.items()):
        by_host.setdefault(ring.host or ("unknown", rank), []).append(rank)
    recordings = {rank: read_steps(ring.events()) for rank, ring in sorted(rings.items())}
    hosts: list[Host] = []
    for ranks in by_host.values():
        shift = Shift(0, 0)
        if hosts:
            shift = _shift(hosts[0].ranks, ranks, rings, recordings)
            for rank in ranks:
                events = (event._replace(at=event.at + shift.ns) for event in rings[rank].events())
                recordings[rank] = read_steps(events)
        hosts.append(Host(ranks, shift))
    steps = match(recordings)
    for together in steps:
        note_launches(together)
    return Run(dict(sorted(rings.items())), recordings, hosts, steps, left_out or [])


def _shift(
    here: list[int],
    there: list[int],
    rings: Mapping[int, Ring],
    recordings: Mapping[int, Recording],
) -> Shift:
    by_date = _boot(there, rings) - _boot(here, rings)
    together = done_together(
        [_by_key(recordings[rank]) for rank in here], [_by_key(recordings[rank]) for rank in there]
    )
    return shift_between(together, by_date)


def _boot(ranks: list[int], rings: Mapping[int, Ring]) -> int:
    """Returns when the clock of a host was zero, in nanoseconds since 1970."""
    return round(median(rings[rank].made_epoch_ns - rings[rank].made_ns for rank in ranks))


def _by_key(recording: Recording) -> dict[Key, Step]:
    return {(step.owner, step.number): step for step in recording.steps}

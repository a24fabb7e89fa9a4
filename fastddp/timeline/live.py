"""The report of a running process, from its own ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastddp.timeline.run import Run, make_run
from fastddp.timeline.summary import ModelSummary, summarize
from fastddp.timeline.text import report_text
from fastddp.watch import events, ring_reader


@dataclass(frozen=True)
class Report:
    """Where the time of the latest training steps went, made to be printed."""

    run: Run
    """The recordings that it is made of: one, or those of all ranks."""
    models: list[ModelSummary]
    """A summary for each model that was trained, in the order of their first steps."""

    @classmethod
    def of(cls, run: Run) -> Report:
        """Makes the report of a run."""
        return cls(run, summarize(run.recordings, run.world_size))

    def __str__(self) -> str:
        return report_text(self.run, self.models)

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as dictionaries, lists and numbers; times are in milliseconds."""
        return {
            "ranks": sorted(self.run.rings),
            "world_size": self.run.world_size,
            "models": [model.as_dict() for model in self.models],
        }


def report() -> Report:
    """Tells where the time of this process's latest training steps went.

    The steps are those that this process's ring of events still holds, some hundreds for most
    models. For each part of a step (data loading and other work of the script, forward, backward,
    communication that nothing hides, optimizer) there are the median, the 95th percentile and the
    trend. On shared memory it also tells which rank was the last to come and by how much. How much
    of that was before the late rank's forward began is known from the recordings of all ranks only:
    ``python -m fastddp report`` reads those.

    It is not collective and may be called from any thread, also while a step is under way, which
    is left out. It takes tens of milliseconds.

    Returns:
        The report: ``print`` shows it as a table, and :meth:`Report.as_dict` gives the figures.
    """
    ring = ring_reader.parse(events.snapshot())
    return Report.of(make_run({ring.rank or 0: ring}))

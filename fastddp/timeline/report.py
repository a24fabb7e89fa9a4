"""A report: recordings and their summaries, to be printed or taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastddp.timeline.run import Run
from fastddp.timeline.summary import ModelSummary, summarize
from fastddp.timeline.text import report_text


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
        return cls(run, summarize(run.steps, run.world_size))

    def __str__(self) -> str:
        return report_text(self.run, self.models)

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures as dictionaries, lists and numbers; times are in milliseconds."""
        return {
            "ranks": sorted(self.run.rings),
            "world_size": self.run.world_size,
            "models": [model.as_dict() for model in self.models],
        }

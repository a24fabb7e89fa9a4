"""The report of a running process, from its own ring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastddp.watch import events

if TYPE_CHECKING:
    from fastddp.timeline.report import Report


def report() -> Report:
    """Tells where the time of this process's latest training steps went.

    The steps are those that this process's ring of events still holds, some hundreds for most
    models. For each part of a step (data loading and other work of the script, forward, backward,
    communication that nothing hides, optimizer) there are the median, the 95th percentile and the
    trend. On shared memory it also tells which rank was the last to come and by how much. How much
    of that was before the late rank's forward began is known from the recordings of all ranks only:
    ``python -m fastddp report`` reads those.

    It is not collective and may be called from any thread, also while a step is under way, which
    is left out. It takes up to 0.2 s.

    Returns:
        The report: ``print`` shows it as a table, and
        :meth:`fastddp.timeline.report.Report.as_dict` gives the figures.
    """
    # Imported only now: few processes ask, and all of them import fastddp.
    from fastddp.timeline.report import Report
    from fastddp.timeline.run import make_run
    from fastddp.watch import ring_reader

    ring = ring_reader.parse(events.snapshot())
    return Report.of(make_run({ring.rank or 0: ring}))

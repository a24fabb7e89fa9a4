"""``python -m fastddp report DIRECTORY``: all that can be told of the rings in a directory."""

from __future__ import annotations

from pathlib import Path

from fastddp.timeline.chrome import write_trace
from fastddp.timeline.page import page
from fastddp.timeline.picture import draw, why_no_picture
from fastddp.timeline.report import Report
from fastddp.timeline.run import read_run


def write_report(directory: Path) -> str:
    """Writes ``trace.json``, ``timeline.png`` and ``report.html`` beside the rings of a run.

    Args:
        directory: the folder of the ranks' rings; those of the latest run in it count.

    Returns:
        The report as text, and the names of what was written.

    Raises:
        FileNotFoundError: if there is no ring in the directory.
        OSError: if a file cannot be written.
    """
    report = Report.of(read_run(directory))
    run, models = report.run, report.models
    written = ["trace.json (for https://ui.perfetto.dev)"]
    write_trace(run, directory / "trace.json")
    why_none = "there is no step that is whole" if not models else why_no_picture()
    picture = None
    if why_none is None:
        picture = draw(run, models)
        (directory / "timeline.png").write_bytes(picture)
        written.append("timeline.png")
    text = page(run, models, picture, why_none)
    (directory / "report.html").write_text(text, encoding="utf-8")
    written.append("report.html")
    lines = [str(report), "", f"Written to {directory}: {', '.join(written)}."]
    if why_none is not None:
        lines.append(f"No picture: {why_none}.")
    return "\n".join(lines)

"""A report for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from fastddp.timeline.notes import headline, notes
from fastddp.timeline.run import Run
from fastddp.timeline.sentences import what_could_be_saved, who_was_last
from fastddp.timeline.summary import ModelSummary
from fastddp.timeline.tables import Table, tables, title

WIDTH = 100


def report_text(run: Run, models: Sequence[ModelSummary]) -> str:
    """Returns a report as lines of text.

    Args:
        run: the recordings that the report is about.
        models: the summaries of the models that were trained.
    """
    blocks = [f"fastddp report: {headline(run, models)}"]
    for model in models:
        if name := title(model, models):
            blocks.append(name)
        blocks += [_lay_out(table) for table in tables(model)]
        saved, last = (
            what_could_be_saved(model, run.world_size),
            who_was_last(model, run.world_size),
        )
        blocks.append(_fill([*saved, *last]))
    blocks.append(_fill(notes(run)))
    return "\n\n".join(block for block in blocks if block)


def _fill(sentences: Sequence[str]) -> str:
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False)
        for line in sentences
    )


def _lay_out(table: Table) -> str:
    """Returns a table with its first column to the left and all others to the right."""
    heads = [[table.columns[0]], *(_lines(column) for column in table.columns[1:])]
    height = max(map(len, heads))
    above = [[""] * (height - len(head)) + head for head in heads]
    rows = [[column[line] for column in above] for line in range(height)] + table.rows
    widths = [max(len(row[place]) for row in rows) for place in range(len(table.columns))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _lines(head: str) -> list[str]:
    """Returns the words of a head of a column, in few lines that are not wide."""
    return textwrap.wrap(head, 13)

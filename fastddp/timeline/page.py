"""A report as one HTML page that needs nothing else: tables, sentences and the picture."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape

from fastddp.timeline.notes import headline, notes
from fastddp.timeline.run import Run
from fastddp.timeline.sentences import what_could_be_saved, who_was_last
from fastddp.timeline.summary import ModelSummary
from fastddp.timeline.tables import Table, tables, title

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
th { vertical-align: bottom; font-weight: 600; max-width: 9em; }
img { max-width: 100%; }
"""


def page(
    run: Run, models: Sequence[ModelSummary], picture: bytes | None, why_none: str | None
) -> str:
    """Returns the page.

    Args:
        run: the recordings that the report is about.
        models: the summaries of the models that were trained.
        picture: a PNG to be put into the page; None for no picture.
        why_none: why there is no picture, for people.
    """
    return "\n".join(_lines(run, models, picture, why_none)) + "\n"


def _lines(
    run: Run, models: Sequence[ModelSummary], picture: bytes | None, why_none: str | None
) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f"<title>fastddp report</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield f"<h1>fastddp report</h1>\n<p>{escape(headline(run, models))}</p>"
    for model in models:
        if name := title(model, models):
            yield f"<h2>{escape(name)}</h2>"
        yield from _paragraphs(who_was_last(model, run.world_size))
        yield from _paragraphs(what_could_be_saved(model, run.world_size))
        for table in tables(model):
            yield from _table(table)
    yield from _paragraphs(notes(run))
    if picture is not None:
        encoded = base64.b64encode(picture).decode()
        yield f'<img alt="What each rank did when" src="data:image/png;base64,{encoded}">'
    elif why_none is not None:
        yield from _paragraphs([f"No picture: {why_none}."])
    yield "</body>\n</html>"


def _paragraphs(sentences: Sequence[str]) -> Iterator[str]:
    yield from (f"<p>{escape(text)}</p>" for text in sentences)


def _table(table: Table) -> Iterator[str]:
    yield "<table>"
    yield _row("th", table.columns)
    yield from (_row("td", row) for row in table.rows)
    yield "</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

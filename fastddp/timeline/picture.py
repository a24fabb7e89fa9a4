"""A picture of a run: what the ranks did in the latest steps, and what all steps consisted of.

Drawn with matplotlib, which is imported here only, and without its global state.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from fastddp.timeline.notes import headline
from fastddp.timeline.parts import Part, parts_of
from fastddp.timeline.recording import Step
from fastddp.timeline.run import Run
from fastddp.timeline.slices import Activity, Slice, slices_of
from fastddp.timeline.spans import Span
from fastddp.timeline.summary import ModelSummary, average, owner_of
from fastddp.timeline.tables import shown_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, DOTS_PER_INCH = 12.0, 100
LANE_INCHES = 0.75
STEPS_SHOWN = 4
"""How many steps the lanes show: with more, a step would be too narrow to be read."""
MOST_OF_MEDIAN = 3
"""A step that takes longer, in medians, is cut off: others could not be seen beside it."""

# From M. Okabe and K. Ito's palette, "Color Universal Design" (2008), which people with any kind of
# colour vision can tell apart.
COLOURS = {
    Activity.FORWARD: "#56B4E9",
    Activity.EARLIER: "#B9DDF3",
    Activity.BACKWARD: "#0072B2",
    Activity.LATE: "#D55E00",
    Activity.TRANSFER: "#F0A030",
    Activity.OPTIMIZER: "#CC79A7",
    Activity.COPY: "#F0E442",
    Activity.GATHERING: "#A8DCC8",
    Activity.COLLECTIVE: "#009E73",
    Activity.STALL: "#000000",
}
WHAT_TO_INSTALL = 'matplotlib, which draws it, is not installed: pip install "fastddp[report]"'

PARTS = {
    Part.FORWARD: COLOURS[Activity.FORWARD],
    Part.BACKWARD: COLOURS[Activity.BACKWARD],
    Part.LATE: COLOURS[Activity.LATE],
    Part.TRANSFER: COLOURS[Activity.TRANSFER],
    Part.OPTIMIZER: COLOURS[Activity.OPTIMIZER],
    Part.EARLIER: COLOURS[Activity.EARLIER],
    Part.OTHER: "#DDDDDD",
}
"""From the bottom up."""

# A lane has the rank's own thread above, and below what goes on beside it.
HEIGHTS = {
    Activity.COLLECTIVE: (0.62, 0.14),
    Activity.GATHERING: (0.62, 0.14),
    Activity.COPY: (0.80, 0.10),
    Activity.STALL: (0.93, 0.05),
}
OWN_THREAD = (0.08, 0.50)


def why_no_picture() -> str | None:
    """Returns why nothing can be drawn here, with the next step; None if it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return WHAT_TO_INSTALL
    return None


def draw(run: Run, models: Sequence[ModelSummary]) -> bytes:
    """Returns the picture of a run as a PNG, 1,200 pixels wide.

    Args:
        run: the recordings of the run.
        models: the summaries of the models that were trained, at least one.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    model = max(models, key=lambda model: model.average.num_steps)
    matched = [steps for steps in run.steps if owner_of(steps) == model.owner]
    ranks = shown_ranks(model)
    height = 3.4 + LANE_INCHES * len(ranks)
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    lanes, parts = figure.subplots(2, 1, height_ratios=[LANE_INCHES * len(ranks) + 0.4, 1.8])
    figure.suptitle(f"fastddp: {headline(run, models)}", fontsize=11)
    _draw_lanes(lanes, run, matched, ranks)
    _draw_parts(parts, matched)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_lanes(
    axes: Axes,
    run: Run,
    matched: Sequence[Mapping[int, Step]],
    ranks: Sequence[int],
) -> None:
    latest = matched[-STEPS_SHOWN:]
    window = _window(latest)
    drawn = set()
    for lane, rank in enumerate(ranks):
        inside = [
            Slice(piece.activity, piece.span.within(window), piece.facts)
            for piece in slices_of(run.recordings[rank])
        ]
        inside = [piece for piece in inside if piece.span.length]
        drawn |= {piece.activity for piece in inside}
        for activity in COLOURS:
            spans = [piece.span for piece in inside if piece.activity is activity]
            top, tall = HEIGHTS.get(activity, OWN_THREAD)
            axes.broken_barh(
                [((span.begin - window.begin) / 1e6, span.length / 1e6) for span in spans],
                (lane + top, tall),
                facecolors=COLOURS[activity],
                linewidth=0,
            )
    for steps in latest:
        begin = min(step.forward for step in steps.values())
        number = next(iter(steps.values())).number
        axes.annotate(
            f"step {number}",
            ((begin - window.begin) / 1e6, 0),
            xytext=(2, 3),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(
        xlim=(0, window.length / 1e6),
        ylim=(len(ranks), -0.3),
        yticks=[lane + 0.42 for lane in range(len(ranks))],
        yticklabels=[f"rank {rank}" for rank in ranks],
        xlabel="milliseconds; each lane: the rank's own thread above, collectives and copies below",
    )
    for lane in range(1, len(ranks)):
        axes.axhline(lane, color="#DDDDDD", linewidth=0.6)
    _tidy(axes)
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=COLOURS[a], label=a.value) for a in COLOURS if a in drawn],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=5,
        frameon=False,
        fontsize=9,
    )


def _window(steps: Iterable[Mapping[int, Step]]) -> Span:
    every = [step for by_rank in steps for step in by_rank.values()]
    begin, end = min(step.forward for step in every), max(step.end for step in every)
    margin = (end - begin) // 100
    return Span(begin - margin, end + margin)


def _draw_parts(axes: Axes, matched: Sequence[Mapping[int, Step]]) -> None:
    """Draws how long the parts of each step took, on the average of the ranks."""
    numbers, heights = [], []
    for steps in matched:
        parts = [parts_of(step) for step in steps.values() if step.begin is not None]
        if parts:
            numbers.append(next(iter(steps.values())).number)
            mean = average(parts)
            heights.append([mean[part] / 1e6 for part in PARTS])
    if len(numbers) > 1:
        axes.stackplot(numbers, *zip(*heights, strict=True), colors=PARTS.values(), linewidth=0)
        axes.set_xlim(min(numbers), max(numbers))
        whole = [sum(of_step) for of_step in heights]
        axes.set_ylim(0, 1.05 * min(max(whole), MOST_OF_MEDIAN * median(whole)))
    axes.set(xlabel="step", ylabel="milliseconds")
    axes.set_title("parts of a step, average of the ranks; grey: outside of all others", fontsize=9)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)

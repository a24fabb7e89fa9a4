"""A picture of a run: what the ranks did in the latest steps, and how long steps took.

Drawn with matplotlib, which is imported here only, and without its global state.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastddp.timeline.findings import headline, shown_ranks, title
from fastddp.timeline.matched import Key, last_launches, match
from fastddp.timeline.run import Run
from fastddp.timeline.slices import Activity, Slice, slices_of
from fastddp.timeline.spans import Span
from fastddp.timeline.steps import Step
from fastddp.timeline.summary import ModelSummary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, DOTS_PER_INCH = 12.0, 100
STEPS_SHOWN = 4
"""How many steps the lanes show: with more, a step would be too narrow to be read."""

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

    matched = match(run.recordings)
    model = max(models, key=lambda model: model.all_ranks.num_steps)
    ranks = shown_ranks(model)
    height = 3.6 + 0.62 * len(ranks)
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    lanes, times = figure.subplots(2, 1, height_ratios=[0.62 * len(ranks) + 0.5, 1.9])
    figure.suptitle(f"fastddp: {headline(run, models)}", fontsize=11)
    _draw_lanes(lanes, run, matched, model, ranks)
    _draw_times(times, matched, models, ranks)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_lanes(
    axes: Axes,
    run: Run,
    matched: Mapping[Key, Mapping[int, Step]],
    model: ModelSummary,
    ranks: Sequence[int],
) -> None:
    latest = [(key, steps) for key, steps in matched.items() if key[0] == model.owner]
    window = _window([steps for _, steps in latest[-STEPS_SHOWN:]])
    launches = {key: last_launches(steps) for key, steps in matched.items()}
    drawn = set()
    for lane, rank in enumerate(ranks):
        inside = [
            Slice(piece.activity, piece.span.within(window), piece.facts)
            for piece in slices_of(run.recordings[rank], launches)
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
    for steps in (steps for _, steps in latest[-STEPS_SHOWN:]):
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
    return Span(min(step.forward for step in every), max(step.end for step in every))


def _draw_times(
    axes: Axes,
    matched: Mapping[Key, Mapping[int, Step]],
    models: Sequence[ModelSummary],
    ranks: Sequence[int],
) -> None:
    """Draws how long each step took, on each rank."""
    from matplotlib import colormaps

    colours: Any = colormaps["tab20" if len(ranks) > 10 else "tab10"]
    for model in models:
        for nth, rank in enumerate(ranks):
            steps = [
                steps[rank]
                for (owner, _), steps in matched.items()
                if owner == model.owner and rank in steps and steps[rank].begin is not None
            ]
            name = ", ".join(text for text in (f"rank {rank}", title(model, models)) if text)
            waits = [step.exposed.length / 1e6 for step in steps]
            numbers = [step.number for step in steps]
            whole = [(step.end - (step.begin or 0)) / 1e6 for step in steps]
            marker = "." if len(steps) < 3 else ""
            colour = colours(nth)
            axes.plot(numbers, whole, color=colour, linewidth=1, marker=marker, label=name)
            axes.plot(numbers, waits, color=colour, linewidth=0.8, marker=marker, alpha=0.5,
                      linestyle=":")  # fmt: skip
    axes.set(xlabel="step", ylabel="milliseconds")
    axes.set_title("the whole step, and dotted: communication that it waits for", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    _tidy(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)

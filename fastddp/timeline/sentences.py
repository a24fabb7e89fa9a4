"""Sentences of a report: what could be saved, and which ranks kept the others waiting."""

from __future__ import annotations

from fastddp.timeline.parts import Part
from fastddp.timeline.summary import LastRank, ModelSummary
from fastddp.timeline.wording import in_ms

MOST_LAST = 3
"""How many of the ranks that were last are named."""
WORTH_NAMING = 0.01
"""The least share of the steps' time that a late rank costs, if it is named."""


def what_could_be_saved(model: ModelSummary, world_size: int | None) -> list[str]:
    """Returns a sentence with bounds for what faster communication could save, and even ranks.

    From some of the ranks only nothing follows: the others may wait longer.

    Args:
        model: the summary of a model.
        world_size: the number of ranks that there are; None if it is not known.
    """
    if world_size == 1 or len(model.ranks) != world_size:
        return []

    def most(part: Part) -> str:
        waits = [of.parts[part].median for of in model.ranks.values() if part in of.parts]
        share = max(waits, default=0.0) / (model.average.step.median or 1.0)
        return f"{in_ms(max(waits, default=0.0))} ms ({100 * share:.1f} %)"

    return [
        f"A step would be at most {most(Part.TRANSFER)} shorter if communication took no time, and"
        f" at most {most(Part.LATE)} if no rank was late."
    ]


def who_was_last(model: ModelSummary, world_size: int | None) -> list[str]:
    """Returns sentences that name the ranks that kept the others waiting.

    Args:
        model: the summary of a model.
        world_size: the number of ranks that there are; None if it is not known.
    """
    if world_size == 1:
        return []
    if not model.lasts:
        return [
            "Which rank was last is not known from one rank: python -m fastddp report DIRECTORY"
            " compares the recordings of all."
        ]
    time = model.average.step.median * sum(last.num_last for last in model.lasts)
    worth = [last for last in model.lasts if last.total > WORTH_NAMING * time][:MOST_LAST]
    if not worth:
        worst = model.lasts[0]
        return [
            "No rank was late to speak of: the last one to come costs less than"
            f" {100 * WORTH_NAMING:.0f} % of a step (rank {worst.rank} most often costs time, by"
            f" {in_ms(worst.by)} ms at the median)."
        ]
    return [_sentence(last) for last in worth]


def _sentence(last: LastRank) -> str:
    text = f"Rank {last.rank} was last in {100 * last.share:.0f} % of steps, by {in_ms(last.by)} ms"
    text += " at the median"
    causes = {
        "before its forward began": last.before_forward,
        "in its forward": last.in_forward,
        "in its backward": last.in_backward,
    }
    known = {text: ms for text, ms in causes.items() if ms is not None}
    if not known:
        return text + "."
    cause = max(known, key=lambda text: known[text])
    return f"{text}; {in_ms(max(0, min(known[cause], last.by)))} ms of that {cause}."

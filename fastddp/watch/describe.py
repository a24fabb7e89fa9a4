"""The words for a wait, the same on every rank that has the same models."""

from __future__ import annotations

from fastddp.watch import names
from fastddp.watch.layout import Source
from fastddp.watch.snapshot import Snapshot, WaitSeen


def describe_wait(wait: WaitSeen, board: Snapshot | None) -> str:
    """Returns text such as ``the all-reduce of bucket 1 of model 'Net' (a.weight), step 6``.

    Args:
        wait: the wait, as it stands on the board.
        board: the board of the rank that waits.
    """
    model = names.of(wait.owner, wait.group)
    title = model.title or "a model"
    text = wait.text or "a collective"
    if wait.bucket is not None:
        inside = model.in_bucket(wait.bucket)
        text = f"the all-reduce of bucket {wait.bucket} of {title}"
        text += f" ({inside})" if inside else ""
    if wait.source is Source.SCRIPT:
        text = f"the script's own {text}"
    elif group := names.of_group(wait.group):
        text += f" on group '{group}'"
    step = _step(wait, board)
    return f"{text}, step {step}" if step else text


def _step(wait: WaitSeen, board: Snapshot | None) -> int:
    """Returns the number of the step that a wait is in, from 1 on; 0 if it is not known."""
    model = board.model(wait.owner, wait.group) if board is not None and wait.owner else None
    return model.steps + 1 if model is not None else 0

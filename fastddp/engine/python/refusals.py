"""What a reducer refuses to do, and the text of each refusal."""

from __future__ import annotations

from typing import NoReturn

from fastddp.engine.python.context import Context
from fastddp.engine.python.parameters import Parameter
from fastddp.engine.python.phase import Phase


def backward_in(phase: Phase, context: Context, what: str) -> NoReturn:
    """Refuses a gradient while the gradients of a manual round are in flight, or written already.

    Args:
        phase: the phase of the round, IN_FLIGHT or FINALIZED.
        context: the facts that all parts of the reducer share.
        what: the event that is refused, as a clause.
    """
    if phase is Phase.IN_FLIGHT:
        raise RuntimeError(
            f"fastddp: rank {context.rank}: {what} while the gradients of the backward before are"
            " in flight; call finalize_backward() before the next backward"
        )
    raise RuntimeError(
        f"fastddp: rank {context.rank}: {what} after finalize_backward() was called in the same"
        " backward; call it from where all of the model's gradients are there, or after"
        " backward"
    )


def backward_before_agreement(context: Context) -> NoReturn:
    """Refuses a backward while the other ranks wait to compare models."""
    raise RuntimeError(
        f"fastddp: rank {context.rank}: {context.title} has changed on a rank, and the"
        " others wait for this one to compare theirs, since its latest backward has"
        " raised; run a forward in grad mode before the next backward"
    )


def capture_too_early(context: Context) -> NoReturn:
    """Refuses to record a round that would allocate memory or wait for the host."""
    raise RuntimeError(
        f"fastddp: rank {context.rank}: a graph is being captured in one of the first two"
        " synchronised backwards of this model, or the first after one that raised; run it"
        " two times before the capture"
    )


def capture_of_lazy_buckets(context: Context) -> NoReturn:
    """Refuses to record writes to memory that will belong to the script."""
    raise RuntimeError(
        f"fastddp: rank {context.rank}: a graph would go on to write to buckets that"
        " lazy_bucket_allocation=True leaves to the script; wrap the model without it"
    )


def finalization_of_nothing(context: Context) -> NoReturn:
    """Refuses ``finalize_backward()`` where no manual round is under way."""
    raise RuntimeError(
        f"fastddp: rank {context.rank}: finalize_backward(), but no gradients are in flight;"
        " call it once for each synchronised backward that began with"
        " require_manual_backward_finalization = True"
    )


def finalization_in_another_graph(context: Context) -> NoReturn:
    """Refuses to end a round in another capture than the one in which it began."""
    raise RuntimeError(
        f"fastddp: rank {context.rank}: finalize_backward() has to be captured into the graph"
        " that its backward was captured into; call it within the same capture"
    )


def finalization_out_of_turn(context: Context, others: str) -> NoReturn:
    """Refuses to launch buckets before those of a round that began earlier on the same group."""
    raise RuntimeError(
        f"fastddp: rank {context.rank}: finalize_backward() of {context.title} in the middle of"
        " a backward that reached another model on the same group before"
        f" ({others}), which still has gradients to send; finalize that one first, or call this"
        " when backward is over"
    )


def finalization_of_another_layout(context: Context, param: Parameter) -> NoReturn:
    """Refuses to write gradients to a parameter that has been changed since backward."""
    before, now = param.layout, param.tensor
    raise RuntimeError(
        f"fastddp: rank {context.rank}: parameter '{param.name}' had shape"
        f" {list(before.shape)} and dtype {before.dtype} in backward, and has"
        f" {list(now.shape)} and {now.dtype} now that its gradient is to be written;"
        " call finalize_backward() before the model is changed. This backward's gradients"
        " are dropped"
    )


def flags_of_a_round_under_way(context: Context) -> NoReturn:
    """Refuses to say which parameters were used before the round is over."""
    raise RuntimeError(
        f"fastddp: rank {context.rank}: which parameters were used is known when the backward"
        " that is under way is over, and finalized"
    )

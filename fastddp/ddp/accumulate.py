"""Gradient accumulation: several backwards, one averaging, one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from fastddp.ddp.wrapper import DistributedDataParallel


@contextmanager
def accumulate(model: DistributedDataParallel, steps: int, *, last: bool = False) -> Iterator[bool]:
    """Averages gradients over ranks in every ``steps``-th use only, and says when.

    Put it around the backward of each micro-batch, whether or not the forward is inside. Gradients
    add up: divide the loss by ``steps`` for their mean. A block that raises counts like any other:
    the other ranks, where it did not, go on.

    Args:
        model: the wrapper that :func:`fastddp.wrap` returned, or another
            :class:`fastddp.DistributedDataParallel`.
        steps: the number of micro-batches that make a step; the same on every rank.
        last: whether this micro-batch completes the step even if it is not yet the ``steps``-th.
            For the end of an epoch; the same on every rank.

    Yields:
        Whether this micro-batch completes a step: after the block, gradients are averaged and it is
        time for the optimizer.

    Raises:
        TypeError: if the model is not wrapped.
        ValueError: if ``steps`` is below 1.

    Example::

        for inputs, targets in loader:
            with fastddp.accumulate(model, steps=4) as complete:
                (loss_of(model(inputs), targets) / 4).backward()
            if complete:
                optimizer.step()
                optimizer.zero_grad()
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"fastddp.accumulate: {type(model).__name__} is not wrapped; give it what"
            " fastddp.wrap(model) returns"
        )
    if steps < 1:
        raise ValueError(f"fastddp.accumulate: steps is a number of micro-batches, got {steps}")
    replica = model._replica
    count = replica.num_accumulated + 1
    complete = last or count >= steps
    replica.num_accumulated = 0 if complete else count
    with nullcontext() if complete else model.no_sync():
        yield complete

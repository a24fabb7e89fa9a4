"""How gradients get into the buckets of one round: one by one, as they arrive.

The C++ engine has a second way, which fills a bucket in one pass on a GPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from fastddp.device.streams import Touched
from fastddp.engine.python.context import Context
from fastddp.engine.python.manner import Gives, Manner
from fastddp.engine.python.parameters import Parameter
from fastddp.engine.python.places import Place


@dataclass(slots=True)
class Filling:
    """The state of one bucket in one round."""

    missing: int
    """Gradients that are still to come."""
    touched: Touched = field(default_factory=Touched)
    """The streams that have worked on the bucket."""
    is_new: bool = False
    """Whether the memory of the bucket was allocated in this round."""
    is_launched: bool = False


@dataclass(frozen=True, slots=True)
class Bystander:
    """A gradient that the round's own backward did not produce, as it was before the round."""

    param: Parameter
    grad: torch.Tensor | None


class OneByOne:
    """Puts gradients into their places, each when it arrives or when its bucket is launched.

    Args:
        manner: how the round goes.
        context: the facts that all parts of the reducer share.
    """

    def __init__(self, manner: Manner, context: Context) -> None:
        self.taken: Counter[int] = Counter()
        """How many gradients each parameter has got in this backward so far."""
        self.arrival: list[Parameter] = []
        """The parameters in the order of their first gradients."""
        self.aliases: dict[int, torch.Tensor] = {}
        """What was in ``.grad``, by parameter, if the script has left it as it was handed out."""
        self.bystanders: list[Bystander] = []
        self.error: RuntimeError | None = None
        """What is wrong with a gradient, for the end of the round."""
        self._manner = manner
        self._context = context

    def put(self, place: Place, filling: Filling, grad: torch.Tensor) -> None:
        """Moves a gradient of the backward from ``.grad`` to its place; ``.grad`` is then empty.

        Args:
            place: the place in a bucket that the gradient goes to.
            filling: the state of that bucket in this round.
            grad: the gradient in ``.grad``.

        Raises:
            RuntimeError: if the gradient does not fit, or comes after the bucket was launched.
            TypeError: if the gradient is sparse and the place is not.
        """
        param = place.param
        self._note_alias(place, grad)
        grad = place.accept(grad)
        taken = self.taken[param.index]
        if taken == 0:
            if filling.is_new:  # behind the stream that has allocated it
                filling.touched.by_current_after_all(self._context.device)
            else:
                filling.touched.by_current(self._context.device)
            place.put(grad, self._manner.scale)
            self.arrival.append(param)
        elif not filling.is_launched:
            filling.touched.by_current_after_all(self._context.device)
            place.add(grad, self._manner.scale)
        else:
            raise RuntimeError(
                f"fastddp: rank {self._context.rank}: parameter '{param.name}' got gradient number"
                f" {taken + 1} of one backward after {taken} had been sent, as many as it ever got"
                " before. This happens when re-entrant activation checkpoints begin to share a"
                " parameter in the midst of training; use checkpoint(..., use_reentrant=False)"
            )
        self.taken[param.index] += 1
        if self.taken[param.index] == param.expected:
            filling.missing -= 1
        param.tensor.grad = None

    def put_leftover(self, place: Place) -> None:
        """Fills the place of a parameter that the round's backward gave no gradient.

        The place gets what is in ``.grad``, or zeros if that is empty. If what is in ``.grad``
        counts as a gradient of this round, the flag stays as it is. Otherwise the old ``.grad``
        comes back after the round if no rank had a gradient.
        """
        if self._manner.is_retired:
            place.clear()
            place.flag.zero_()
            return
        grad, place.param.tensor.grad = place.param.tensor.grad, None
        old = grad
        counts = grad is not None and self._counts(place.param, grad)
        if grad is not None:
            self._note_alias(place, grad)
            try:
                grad = place.fit(grad)
            except RuntimeError as error:  # raised at the end: the other ranks wait for the round
                self.error = self.error or error
                grad, counts = None, False
        # The reduction overwrites the slot. If no rank has a new gradient, the old one must come
        # back bit for bit.
        if grad is not None and not counts and place.holds(grad):
            old = grad.clone()
        if grad is None or self._manner.gives is Gives.NOTHING:
            place.clear()
        else:
            place.put_leftover(grad, self._manner.scale)
        if not counts:
            place.flag.zero_()
            self.bystanders.append(Bystander(place.param, old))

    def _counts(self, param: Parameter, grad: torch.Tensor) -> bool:
        """Returns whether what is in ``.grad`` counts as a gradient of this round.

        What unsynchronised backwards have left counts: the round averages it too.
        """
        if self._manner.gives is Gives.BACKWARD:
            return param.has_left(grad)
        return self._manner.gives is Gives.WHAT_IS_THERE

    def _note_alias(self, place: Place, grad: torch.Tensor) -> None:
        if place.is_as_handed_out(grad):
            self.aliases[place.param.index] = grad

"""Verifies that a variant computes the values of torch's class; else its time means nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.step.models import Batch, Model
from benchmarks.step.replica import Replica
from benchmarks.step.variants import TORCH


def one_order_of_summation() -> bool:
    """Returns whether a sum has one order only: a + b equals b + a, so bits can be compared."""
    return dist.get_world_size() <= 2


def check_steps(
    replicas: Mapping[str, Replica], original: nn.Module, model: Model, steps: int
) -> str | None:
    """Compares the gradients and buffers of each synchronising replica with those of torch.

    The weights do not change, so that each step is compared by itself. All steps are run in any
    case, because a rank that stopped early would leave the others waiting in a collective.

    Returns:
        The first problem; None if there is none.
    """
    problem = None
    for step in range(steps):
        batch = model.batch(dist.get_rank(), step)
        for replica in replicas.values():
            replica.prepare()
            replica.backward(batch)
        bound = None if one_order_of_summation() else rounding_bound(original, model, batch)
        reference = replicas[TORCH]
        for replica in replicas.values():
            if problem is None and replica.variant.synchronises:
                found = first_difference(reference.gradients(), replica.gradients(), bound)
                found = found or first_difference(reference.state(), replica.state())
                problem = found and f"{replica.variant.name}, backward {step + 1}: {found}"
    return problem


def check_training(replicas: Mapping[str, Replica]) -> str | None:
    """Returns the first difference between the synchronising replicas after the timed steps."""
    reference = replicas[TORCH].state()
    for replica in replicas.values():
        if replica.variant.synchronises:
            found = first_difference(reference, replica.state())
            if found is not None:
                return f"{replica.variant.name}, after the timed steps: {found}"
    return None


def first_difference(
    reference: Mapping[str, Tensor],
    candidate: Mapping[str, Tensor],
    bound: Mapping[str, Tensor] | None = None,
) -> str | None:
    """Describes the first tensor that differs in any bit, or by more than `bound`, if one does."""
    for name in dict.fromkeys([*reference, *candidate]):
        if name not in candidate or name not in reference:
            return f"only {'torch' if name in reference else 'the variant'} has {name}"
        expected, got = reference[name], candidate[name]
        if bound is None:
            equal = torch.equal(_bits(expected), _bits(got))
        else:
            equal = bool(((expected - got).abs() <= bound[name]).all())
        if not equal:
            worst = int((expected - got).abs().argmax())
            return (
                f"{name}[{worst}] of {expected.numel()} is {got.flatten()[worst]:.9g}"
                f" where torch has {expected.flatten()[worst]:.9g}"
            )
    return None


def rounding_bound(original: nn.Module, model: Model, batch: Batch) -> dict[str, Tensor]:
    """Returns how much two correct averages may differ, for each element of each gradient.

    W gradients g are summed by W - 1 rounded additions, in any order, and scaled by one more
    rounded operation. Each rounding has an error of at most u * sum|g| (before the scaling), with u
    half the machine epsilon. So an average has an error of at most W * u * sum|g| / W, and two
    averages differ by at most 2u * sum|g| = epsilon * sum|g|. One percent more is allowed for terms
    of order u squared. (Higham, "Accuracy and Stability of Numerical Algorithms", section 4.2.)
    """
    original.zero_grad(set_to_none=True)
    model.loss(original(batch.inputs), batch.targets).backward()
    bound: dict[str, Tensor] = {}
    for name, parameter in original.named_parameters():
        if parameter.grad is not None:
            total = parameter.grad.abs()
            dist.all_reduce(total)
            bound[name] = total * (1.01 * torch.finfo(total.dtype).eps)
    return bound


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().view(torch.uint8)

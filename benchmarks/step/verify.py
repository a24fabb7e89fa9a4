"""What makes a step's time mean something: the values are those of torch's class."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.step.models import Batch, Model
from benchmarks.step.replica import Replica
from benchmarks.step.variants import TORCH


def one_order_of_summation() -> bool:
    """With two ranks a + b is b + a, so right results are equal bit for bit."""
    return dist.get_world_size() <= 2


def check_steps(
    replicas: Mapping[str, Replica], original: nn.Module, model: Model, steps: int
) -> str | None:
    """Compare each synchronising replica's gradients and buffers with torch's, batch by batch.

    The weights stay as they were built, so that each step is judged on its own. All steps are run
    whatever is found: a rank that stopped early would leave the others waiting in a collective.
    Returns the first problem.
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
    """After the timed steps every synchronising replica has been trained to the same bits."""
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
    """Describe the first tensor that differs in any bit, or by more than `bound`, if one does."""
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
    """How far two right averages over the ranks may lie apart, for each element of each gradient.

    W gradients g are summed in W - 1 rounded additions and scaled in one more rounded operation, in
    whatever order. Each rounding errs by at most u * sum|g| (before the scaling), u being half the
    machine epsilon. So an average errs by at most W * u * sum|g| / W, and two of them lie within
    2u * sum|g| = epsilon * sum|g|. One percent more is allowed for terms of order u squared.
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

"""The benchmark of steps refuses to time a variant that computes something wrong."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as TorchDDP

from benchmarks.common.ranks import run_ranks
from benchmarks.step.measure import Plan, measure
from benchmarks.step.variants import VARIANTS, Groups, Variant
from benchmarks.step.verify import first_difference


def slightly_off_on_rank_1(module: nn.Module, groups: Groups) -> nn.Module:
    """Torch's DDP, but on one rank one element of the bucket is off by about one rounding."""

    def hook(state, bucket):  # type: ignore[no-untyped-def]
        average = bucket.buffer().div_(dist.get_world_size())
        dist.all_reduce(average)
        average[-1] *= 1 + 2**-22 * dist.get_rank()
        future = torch.futures.Future()
        future.set_result(average)
        return future

    wrapped = TorchDDP(module, process_group=groups.real)
    wrapped.register_comm_hook(None, hook)
    return wrapped


def unsynchronised(module: nn.Module, _groups: Groups) -> nn.Module:
    return module


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("wrap", [slightly_off_on_rank_1, unsynchronised])
def test_a_wrong_variant_gets_no_time(wrap: object) -> None:
    wrong = Variant("wrong", wrap)  # type: ignore[arg-type]
    plan = Plan(model="tiny", variants=(VARIANTS["torch"], wrong), rounds=1)
    with pytest.raises(Exception, match=r"rank \d: wrong, backward 1: layers.*No time is reported"):
        run_ranks(measure, 2, plan, limit_s=240)


def test_verification_needs_its_reference() -> None:
    with pytest.raises(ValueError, match="'torch' is what the others are verified against"):
        measure(Plan(model="tiny", variants=(VARIANTS["nosync"],)))


def test_a_plan_with_too_little_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup is 4"):
        Plan(model="tiny", variants=(), warmup=4)


def test_first_difference_sees_one_bit() -> None:
    right = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    wrong = {**right, "a": torch.tensor([1.0, 2.0 + 2**-22])}
    assert first_difference(right, dict(right)) is None
    assert first_difference(right, wrong) == "a[1] of 2 is 2.00000024 where torch has 2"


def test_first_difference_sees_a_missing_tensor() -> None:
    one = {"a": torch.zeros(1)}
    assert first_difference(one, {}) == "only torch has a"
    assert first_difference({}, one) == "only the variant has a"


def test_first_difference_allows_its_bound_and_no_more() -> None:
    right, bound = {"a": torch.tensor([1.0])}, {"a": torch.tensor([0.25])}
    assert first_difference(right, {"a": torch.tensor([1.25])}, bound) is None
    assert first_difference(right, {"a": torch.tensor([1.5])}, bound) is not None
    assert first_difference(right, {"a": torch.tensor([torch.nan])}, bound) is not None

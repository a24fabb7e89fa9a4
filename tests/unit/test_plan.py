"""The plan: properties for any parameters, and the same plan from both engines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddp import extension
from fastddp.engine.plan import NUM_MARKS, SLOT_ALIGN_BYTES, BucketPlan, ParamSpec, plan_buckets

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

params_and_order = st.lists(
    st.builds(ParamSpec, numel=st.integers(0, 5000), dtype=st.sampled_from(DTYPES)), max_size=40
).flatmap(lambda params: st.tuples(st.just(params), st.permutations(range(len(params)))))
caps = st.lists(st.integers(1, 20_000), min_size=1, max_size=4)


@given(params_and_order, caps)
def test_every_parameter_has_one_slot_of_its_size_and_dtype(given_params, caps_bytes):
    params, order = given_params
    plan = plan_buckets(params, order, caps_bytes)
    slots = [(slot, bucket) for bucket in plan.buckets for slot in bucket.slots]
    assert sorted(slot.param for slot, _ in slots) == list(range(len(params)))
    for slot, bucket in slots:
        assert slot.numel == params[slot.param].numel
        assert bucket.dtype == params[slot.param].dtype


@given(params_and_order, caps)
def test_slots_and_flags_are_aligned_and_apart(given_params, caps_bytes):
    for bucket in plan_buckets(*given_params, caps_bytes).buckets:
        end = 0
        for slot in bucket.slots:
            assert slot.offset * bucket.dtype.itemsize % SLOT_ALIGN_BYTES == 0
            assert slot.offset >= end
            end = slot.offset + slot.numel
        assert bucket.flags_offset >= end
        assert bucket.numel >= bucket.flags_offset + len(bucket.slots)


@given(params_and_order, caps)
def test_buckets_come_in_the_order_in_which_they_fill(given_params, caps_bytes):
    params, order = given_params
    arrival = {param: nth for nth, param in enumerate(order)}
    plan = plan_buckets(params, order, caps_bytes)
    last = [max(arrival[slot.param] for slot in bucket.slots) for bucket in plan.buckets]
    assert last == sorted(last)
    for bucket in plan.buckets:
        arrivals = [arrival[slot.param] for slot in bucket.slots]
        assert arrivals == sorted(arrivals)


@given(params_and_order, caps)
def test_a_bucket_holds_its_cap_only_with_its_last_slot(given_params, caps_bytes):
    plan = plan_buckets(*given_params, caps_bytes)
    for dtype in DTYPES:
        of_dtype = [bucket for bucket in plan.buckets if bucket.dtype == dtype]
        for nth, bucket in enumerate(of_dtype):
            cap = caps_bytes[min(nth, len(caps_bytes) - 1)]
            assert bucket.slots[-1].offset * dtype.itemsize < cap
            if nth + 1 < len(of_dtype):
                assert bucket.flags_offset * dtype.itemsize >= cap


@pytest.mark.skipif(extension.load() is None, reason="needs the compiled extension")
@given(params_and_order, caps)
def test_both_engines_make_the_same_plan(given_params, caps_bytes):
    params, order = given_params
    assert native_plan(params, order, caps_bytes) == plan_buckets(params, order, caps_bytes)


@pytest.mark.parametrize(
    ("order", "caps_bytes"), [([0, 1], []), ([0], [16]), ([0, 0], [16]), ([0, 2], [16])]
)
def test_bad_orders_and_caps_are_refused_by_both(order, caps_bytes):
    params = [ParamSpec(1, torch.float32)] * 2
    with pytest.raises(ValueError, match="plan_buckets"):
        plan_buckets(params, order, caps_bytes)
    if extension.load() is not None:
        with pytest.raises(ValueError, match="plan_buckets"):
            native_plan(params, order, caps_bytes)


def test_a_complex_parameter_counts_as_pairs_of_reals():
    spec = ParamSpec.of(torch.zeros(3, 2, dtype=torch.complex64))
    assert spec == ParamSpec(12, torch.float32)


def test_bytes_of_a_plan():
    plan = plan_buckets([ParamSpec(4, torch.float64), ParamSpec(1, torch.float32)], [0, 1], [1])
    # Elements of gradients, flags and marks, up to a multiple of 16 bytes.
    assert plan.num_bytes == (4 + 1 + NUM_MARKS) * 8 + (4 + 1 + NUM_MARKS + 2) * 4


def native_plan(params, order, caps_bytes) -> BucketPlan:
    from fastddp import _C
    from fastddp.engine.native import KINDS, from_native

    specs = [_C.ParamSpec(p.numel, p.dtype.itemsize, KINDS.index(p.dtype)) for p in params]
    return from_native(_C.plan_buckets(specs, order, caps_bytes))

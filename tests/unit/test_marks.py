"""Marks at the tail of a bucket: what they say survives any sum, and both languages agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddp.engine.launch_order import LaunchOrder
from fastddp.engine.marks import any_changed, is_mixed, label_of, marks_of
from fastddp.engine.plan import NUM_MARKS

labels = st.integers(0, 2**16 - 1)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@given(labels, st.integers(1, 3000), dtypes, st.booleans())
def test_ranks_with_one_label_agree(label, num_ranks, dtype, has_changed):
    mine = torch.tensor(marks_of(label, has_changed), dtype=dtype)
    others = torch.tensor(marks_of(label, False), dtype=dtype)
    summed = mine.clone()
    for _ in range(min(num_ranks - 1, 300)):  # beyond 256, ones get lost in bfloat16
        summed += others
    assert len(summed) == NUM_MARKS
    assert not is_mixed(label, summed.tolist())
    assert any_changed(summed.tolist()) is has_changed


@given(labels, labels, dtypes)
def test_another_label_is_noticed_on_both_sides(label, other, dtype):
    summed = torch.tensor(marks_of(label, False), dtype=dtype)
    summed += torch.tensor(marks_of(other, False), dtype=dtype)
    assert is_mixed(label, summed.tolist()) is (label != other)
    assert is_mixed(other, summed.tolist()) is (label != other)


def test_labels_of_models_and_buckets_differ():
    labels = {label_of(owner, launch) for owner in (1, 2, 2**32 - 1) for launch in range(50)}
    assert len(labels) == 150
    assert all(0 <= label < 2**16 for label in labels)


def test_rounds_launch_in_the_order_in_which_they_began():
    order = LaunchOrder()
    for reducer in (1, 2, 3):
        order.begin(reducer)
    assert [order.may_launch(reducer) for reducer in (1, 2, 3)] == [True, False, False]
    order.end(2)  # abandoned
    assert not order.may_launch(3)
    order.end(1)
    order.end(1)
    assert order.may_launch(3)


@pytest.mark.parametrize("launch", [0, 1, 7])
def test_a_label_depends_on_owner_and_launch(launch):
    assert label_of(5, launch) != label_of(6, launch)
    assert label_of(5, launch) != label_of(5, launch + 1)

"""When the ranks of a model may meet is a phase with legal moves."""

from __future__ import annotations

import itertools

import pytest

from fastddp.ddp.ranks import Meets, Ranks

LEGAL = {(Meets.NOW, Meets.AT_FORWARD), (Meets.AT_FORWARD, Meets.NOW)}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Meets, Meets)))
def test_only_copies_put_their_meeting_off(before: Meets, after: Meets) -> None:
    ranks = Ranks(None, before)
    if (before, after) in LEGAL:
        ranks.move(after)
        assert ranks.meets is after
        return
    with pytest.raises(RuntimeError, match=f"{before.name} cannot meet {after.name}"):
        ranks.move(after)
    assert ranks.meets is before


def test_a_world_of_one_process_is_alone() -> None:
    ranks = Ranks(None, Meets.NOW)
    assert ranks.alone
    assert ranks.rank == 0
    assert ranks.group is None

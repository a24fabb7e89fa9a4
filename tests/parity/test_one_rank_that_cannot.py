"""One rank that cannot wrap its model stops all, and all are told why."""

from __future__ import annotations

import pytest
from torch.nn.parallel.distributed import _MixedPrecision

import fastddp
from tests.models import Ladder, ladder_x, mean_x
from tests.parity.checks import assert_ladder
from tests.parity.wrapping import MAKES, UNFIT
from tests.ranks import run_ranks


def _one_rank_cannot(rank: int, world_size: int, make_name: str, engine: str) -> None:
    make = getattr(fastddp, make_name)
    for what, (build, error, words) in UNFIT.items():
        for odd in (0, 1):
            with pytest.raises((error, fastddp.MismatchError)) as caught:
                make(build() if rank == odd else Ladder(), engine=engine)
            text = str(caught.value)
            for word in words:
                assert word in text, (what, odd, rank, text)
            if rank == odd:
                assert type(caught.value) is error, "its own error, not what the others are told"
            else:
                assert type(caught.value) is fastddp.MismatchError
                assert f"rank {odd}" in text
        with pytest.raises(error):  # and all of them
            make(build(), engine=engine)
    ours = make(Ladder(), engine=engine)
    ours(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(ours.module, mean_x(0, world_size), "after all that")


@pytest.mark.parametrize("make_name", MAKES)
def test_one_rank_that_cannot_wrap_its_model_stops_all(make_name: str, engine: str) -> None:
    run_ranks(_one_rank_cannot, 2, make_name, engine)


def _one_rank_has_a_bad_option(rank: int, world_size: int, make_name: str) -> None:
    """Options are checked before the ranks talk: the others must not wait for ever."""
    make = getattr(fastddp, make_name)
    for options, error in (
        ({"engine": "quantum"}, ValueError),
        ({"bucket_cap_mb": -1}, ValueError),
        ({"device_ids": [0]}, ValueError),
        ({"bucket_cap_mb_list": 5}, ValueError),
        # What Python itself says to nonsense is told too.
        ({"delay_all_reduce_named_params": 1, "param_to_hook_all_reduce": 1}, TypeError),
        ({"mixed_precision": _MixedPrecision(param_dtype="half")}, ValueError),
    ):
        with pytest.raises((error, fastddp.MismatchError)) as caught:
            make(Ladder(), **(options if rank == 1 else {}))
        assert (type(caught.value) is error) == (rank == 1), caught.value
    with pytest.raises((TypeError, fastddp.MismatchError)) as caught:
        make([Ladder()] if rank == 1 else Ladder())
    assert (type(caught.value) is TypeError) == (rank == 1), caught.value
    if make_name == "wrap":
        with pytest.raises((TypeError, fastddp.MismatchError), match="'bucket_cap_mib'"):
            make(Ladder(), **({"bucket_cap_mib": 1} if rank == 1 else {}))
        with pytest.raises((RuntimeError, fastddp.MismatchError), match="quantum"):
            make(Ladder(), **({"device": "quantum"} if rank == 1 else {}))
    ours = make(Ladder())
    ours(ladder_x(rank, 0, world_size)).backward()
    assert_ladder(ours.module, mean_x(0, world_size), "after all that")


@pytest.mark.parametrize("make_name", MAKES)
def test_one_rank_with_a_bad_option_stops_all(make_name: str) -> None:
    run_ranks(_one_rank_has_a_bad_option, 2, make_name, timeout=20)

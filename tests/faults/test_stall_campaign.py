"""One rank goes wrong, in each of many ways: the others are told of the right rank and cause.

What comes of a run depends on a moment that is chosen by chance, and so do the size of the job, the
engine and the rank. A seed says it all, and is in the name of the test.

FASTDDP_STALL_SEEDS=200 tries that many runs, instead of one for each fault. To see what the ranks
of one run say: CAMPAIGN_SHOW=1 python -m tests.faults.stall_campaign SEED SEED+1.
"""

from __future__ import annotations

import os

import pytest

from fastddp.comm import shm
from tests.conftest import require_native
from tests.faults.stall_campaign import TRANSPORTS, carry_out, choose
from tests.faults.stall_programs import Fault
from tests.slow import slow_but_for

NUM_SEEDS = int(os.environ.get("FASTDDP_STALL_SEEDS", len(Fault)))


def _seeds() -> list[int]:
    """Returns seeds that go through the faults, and from one transport to the next."""
    faults, transports = len(Fault), len(TRANSPORTS)
    return [i + faults * ((i + i // faults) % transports) for i in range(NUM_SEEDS)]


@pytest.mark.parametrize("seed", slow_but_for(_seeds()[:1], _seeds()))
def test_what_is_said_is_right(seed: int) -> None:
    require_native()
    if (reason := shm.why_not()) is not None:
        pytest.skip(reason)
    run = choose(seed)
    seen = carry_out(run)
    assert not seen.wrong, (run, seen)

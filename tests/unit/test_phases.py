"""A reducer goes from phase to phase as the table says, and an illegal move names both phases."""

from __future__ import annotations

import pytest

from fastddp.engine.python.phase import Phase, move

LEGAL = {
    (Phase.BETWEEN, Phase.FILLING),
    (Phase.FILLING, Phase.BETWEEN),
    (Phase.FILLING, Phase.IN_FLIGHT),
    (Phase.FILLING, Phase.FINALIZED),
    (Phase.IN_FLIGHT, Phase.BETWEEN),
    (Phase.FINALIZED, Phase.BETWEEN),
}


@pytest.mark.parametrize("now", Phase)
@pytest.mark.parametrize("to", Phase)
def test_a_move_is_made_or_refused(now: Phase, to: Phase) -> None:
    if (now, to) in LEGAL:
        assert move(now, to) is to
        return
    with pytest.raises(RuntimeError, match=rf"from phase {now.name} \(.*\) to phase {to.name} \("):
        move(now, to)

"""What a reducer has to say beside gradients."""

from __future__ import annotations

from enum import IntEnum


class News(IntEnum):
    """Why a reducer calls back; ``csrc/reducer/reducer.h`` has the same."""

    EMPTY = 0
    """No rank had a gradient for any parameter in the round that has ended."""
    CHANGED = 1
    """In the round that has ended, a rank has retired its reducer: its model has changed."""
    CHANGED_BEFORE = 2
    """The same in a round before the one that begins; on a device, where the host is told late.

    Then this rank's own model had not changed: a rank with a change of its own waits for the device
    to know at once.
    """

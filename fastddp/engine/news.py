"""What a reducer tells its owner, apart from gradients."""

from __future__ import annotations

from enum import IntEnum


class News(IntEnum):
    """The reasons for which a reducer calls back; the C++ engine has the same numbers."""

    EMPTY = 0
    """No rank had a gradient for any parameter in the round that has ended."""
    CHANGED = 1
    """In the round that has ended, a rank has retired its reducer: its model has changed."""
    CHANGED_BEFORE = 2
    """A rank has retired its reducer in a round before the one that begins.

    This happens on a device, where the host reads marks late, and on ranks that had not changed
    their own models: a rank that has changed its model waits for the device to know at once.
    """

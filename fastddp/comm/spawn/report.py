"""What a rank tells the process that started it, and what that answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CALLED: Final = b""
"""What a rank says when its function is about to be called."""
LEAVE: Final = b"."
"""The parent's last word: the rank may leave the group, as all others do."""


@dataclass(frozen=True)
class Report:
    """How a rank's function ended: with a value, or with an error."""

    at: float  # time.monotonic(), which is one clock for all processes
    value: bytes | None = None  # pickled
    no_value: str = ""  # why it could not be pickled
    error: bytes | None = None  # pickled
    error_name: str = ""
    error_text: str = ""  # the traceback
    exit_code: int | None = None  # of sys.exit()

    @property
    def failed(self) -> bool:
        """Whether the function raised."""
        return bool(self.error_name)

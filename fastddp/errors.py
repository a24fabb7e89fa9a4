"""The errors that are fastddp's own. All others are Python's usual ones."""

from __future__ import annotations


class MismatchError(RuntimeError):
    """The ranks of a group do not do the same thing, or one of them could not do its part.

    They wrap models, or gather tensors, that do not fit together. Raised on all of them.
    """


class RankError(RuntimeError):
    """A rank that :func:`fastddp.spawn` started raised, exited or was killed.

    Attributes:
        rank: which.
        exit_code: of the process; ``-9`` for one killed by signal 9. None for a rank that raised.
    """

    def __init__(self, message: str, rank: int, exit_code: int | None = None) -> None:
        super().__init__(message, rank, exit_code)  # all three, or it could not be pickled
        self.rank = rank
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])

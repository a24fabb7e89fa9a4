"""The errors that are fastddp's own. All others are Python's usual ones."""

from __future__ import annotations


class MismatchError(RuntimeError):
    """The ranks of a group do different things, or one of them cannot do its part.

    For example, they wrap different models, or gather tensors that do not fit together. It is
    raised on every rank of the group. The message names the ranks and the values on both sides.
    """


class RankError(RuntimeError):
    """A rank that :func:`fastddp.spawn` started raised, exited or was killed.

    Attributes:
        rank: the index of the failed rank, from 0 to ``nprocs - 1``.
        exit_code: the exit status of the rank's process, ``-9`` if signal 9 killed it. None if the
            rank raised an exception.
    """

    def __init__(self, message: str, rank: int, exit_code: int | None = None) -> None:
        super().__init__(message, rank, exit_code)  # all three, or it could not be pickled
        self.rank = rank
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])

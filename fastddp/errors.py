"""The errors that are fastddp's own. All others are Python's usual ones."""

from __future__ import annotations


class MismatchError(RuntimeError):
    """The ranks of a group do not do the same thing, or one of them could not do its part.

    They wrap models, or gather tensors, that do not fit together. Raised on all of them.
    """

"""The errors that are fastddp's own. All others are Python's usual ones."""

from __future__ import annotations


class MismatchError(RuntimeError):
    """The ranks of a group do not wrap the same model, or one of them could not wrap its own."""

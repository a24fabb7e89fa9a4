"""How numbers are written."""

from __future__ import annotations


def in_ms(milliseconds: float) -> str:
    """Returns a duration with three digits, or as many as it has before the point.

    Args:
        milliseconds: the duration, 0 or more.
    """
    if milliseconds < 0.005:
        return "0"
    if milliseconds >= 99.95:
        return f"{milliseconds:.0f}"
    return f"{milliseconds:.1f}" if milliseconds >= 9.995 else f"{milliseconds:.2f}"


def count(number: int, noun: str) -> str:
    """Returns a number of things, such as ``2 ranks``.

    Args:
        number: the number of things.
        noun: the name of one thing.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

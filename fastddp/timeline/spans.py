"""Spans of time, in nanoseconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """A time that begins and ends."""

    begin: int
    end: int

    @property
    def length(self) -> int:
        """The nanoseconds that it lasts; 0 if it ends before it begins."""
        return max(0, self.end - self.begin)

    def within(self, outer: Span) -> Span:
        """Returns the part that lies inside another span; its length is 0 if there is none.

        Args:
            outer: the other span.
        """
        return Span(max(self.begin, outer.begin), min(self.end, outer.end))


def merged(spans: Iterable[Span]) -> list[Span]:
    """Returns spans that cover the same time by order, without overlap.

    Args:
        spans: what may overlap, in any order.
    """
    result: list[Span] = []
    for span in sorted(span for span in spans if span.length):
        if result and span.begin <= result[-1].end:
            result[-1] = Span(result[-1].begin, max(result[-1].end, span.end))
        else:
            result.append(span)
    return result


def covered(spans: Iterable[Span]) -> int:
    """Returns how many nanoseconds at least one of the spans covers."""
    return sum(span.length for span in merged(spans))


def gaps(spans: Iterable[Span], outer: Span) -> list[Span]:
    """Returns the parts of a span that no other one covers.

    Args:
        spans: the spans that cover something, in any order.
        outer: the span that has the gaps.
    """
    result, at = [], outer.begin
    for span in merged(span.within(outer) for span in spans):
        result.append(Span(at, span.begin))
        at = span.end
    result.append(Span(at, outer.end))
    return [span for span in result if span.length]

"""Which values of a test's parameter `make test` leaves to `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but_for(quick: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return the values of a parameter, of which `make test` tries the quick ones only.

    Args:
        quick: those of the values that represent the others in `make test`.
        values: all values of the parameter, as `make test-all` tries them.
    """
    values = list(values)
    assert any(value in quick for value in values), "nothing would represent the slow values"
    return [
        value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]

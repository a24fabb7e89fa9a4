"""What keeps the bits of a sum the same in all tests of `DataParallel`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """How sums are grouped depends on the number of intra-op threads, which replicas divide."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

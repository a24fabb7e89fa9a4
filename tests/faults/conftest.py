"""What the fault tests of the shared-memory backend share."""

from __future__ import annotations

import pytest

from fastddp.comm import shm
from tests.conftest import require_native


@pytest.fixture
def needs_shm() -> None:
    """Skip the test where ranks cannot share memory."""
    require_native()
    if (reason := shm.why_not()) is not None:
        pytest.skip(reason)

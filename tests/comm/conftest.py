"""Which backends the suite runs over: the one place to add another."""

from __future__ import annotations

import pytest

from tests.comm.common import BACKENDS
from tests.conftest import require_native


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Name a backend of torch.distributed; all must pass the same tests."""
    name: str = request.param
    if name == "shm":
        require_native()
    return name

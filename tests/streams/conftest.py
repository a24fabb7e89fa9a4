"""What the tests of streams share: the stand-in device, compiled."""

from __future__ import annotations

import os

import pytest

from tests.streams import device


@pytest.fixture(scope="session", autouse=True)
def compiled_device() -> None:
    """Compiles the device, or skips; fails instead where CI says that all must run."""
    reason = device.why_not()
    if reason is not None:
        if os.environ.get("FASTDDP_REQUIRE_NATIVE") == "1":
            pytest.fail(f"FASTDDP_REQUIRE_NATIVE=1, but {reason}")
        pytest.skip(reason)
    device.build()

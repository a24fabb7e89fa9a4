"""The benchmark of start-up reports its figures."""

from __future__ import annotations

import pytest

from benchmarks.startup.__main__ import run_probe


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_start_up_probe_reports_its_figures() -> None:
    assert {"import_ms", "first_wrap_ms", "ready_ms", "later_wrap_ms"} <= run_probe("torch").keys()

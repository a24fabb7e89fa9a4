"""The harness that ends what tests leave running: it finds orphans, and leaves others alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import leftovers

ROOT = Path(__file__).resolve().parents[2]
SLEEP = "import time; time.sleep(600)"
MAKE_AN_ORPHAN = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {SLEEP!r}], stdout=subprocess.DEVNULL).pid)
"""
LEAVES_A_PROCESS = f"""
import subprocess, sys
def test_that_leaves_a_process():
    subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
def test_that_follows():
    pass
"""


def test_an_orphan_is_found_named_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    before = leftovers.running()
    made = subprocess.run([sys.executable, "-c", MAKE_AN_ORPHAN], stdout=subprocess.PIPE, text=True)
    orphan = int(made.stdout)
    assert leftovers.running() - before == {orphan}
    monkeypatch.setattr(leftovers, "GRACE_S", 0.1)
    (said,) = leftovers.end(before)
    assert said.startswith(f"process {orphan}: ")
    assert said.endswith(SLEEP)
    assert leftovers.running() <= before


def test_a_process_of_another_run_is_left_alone() -> None:
    """It does not have the name of this run in its environment."""
    names = {name: value for name, value in os.environ.items() if not name.startswith("TEST_RUN_")}
    before = leftovers.running()
    other = subprocess.Popen([sys.executable, "-c", SLEEP], env=names)
    try:
        assert leftovers.end(before) == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_the_test_that_leaves_a_process_fails_and_the_next_one_does_not(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text(LEAVES_A_PROCESS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "tests.conftest", tmp_path],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "2 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "test_that_leaves_a_process" in done.stdout
    assert "the test has left what it started:\nprocess " in done.stdout

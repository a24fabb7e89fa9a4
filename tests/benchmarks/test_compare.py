"""Two trees compared by the same benchmark: which records count, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.compare import __main__ as compare_trees


def write_tree(folder: Path, ratio: float) -> Path:
    """A source tree with a step benchmark that takes no time and finds what it is told."""
    (folder / "benchmarks").mkdir(parents=True)
    record = {"model": "tiny", "variant": "fastddp", "ratio": {"value": ratio}}
    yardstick = {"model": "tiny", "variant": "torch", "ratio": {"value": 1.0}}
    unchecked = {"model": "tiny", "variant": "fastddp-noop", "ratio": None}
    lines = "\n".join(json.dumps(r) for r in (record, yardstick, unchecked))
    source = f"import pathlib, sys\npathlib.Path(sys.argv[-1]).write_text({lines!r})\n"
    (folder / "benchmarks" / "step.py").write_text(source)
    return folder


def test_a_slower_tree_is_told_from_a_faster_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = write_tree(tmp_path / "before", 1.5), write_tree(tmp_path / "after", 1.2)
    monkeypatch.setattr(compare_trees, "HERE", after)
    file = tmp_path / "found.jsonl"
    compare_trees.main(["--before", str(before), "--repeats", "2", "--json", str(file), "step"])
    (found,) = map(json.loads, file.read_text().splitlines())
    assert (found["case"], found["before"], found["after"]) == (
        "tiny fastddp",
        [1.5] * 2,
        [1.2] * 2,
    )
    assert found["change"]["value"] == pytest.approx(0.8)


def test_trees_without_a_common_case_are_refused() -> None:
    runs = {"before": [{"tiny fastddp": 1.0}], "after": [{"wide fastddp": 1.0}]}
    with pytest.raises(ValueError, match="no case of fastddp's in common"):
        compare_trees.compare("step", runs, {})


def test_a_run_that_fails_ends_the_comparison(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "step.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(compare_trees.subprocess.CalledProcessError):
        compare_trees.run(tmp_path, "step", [])

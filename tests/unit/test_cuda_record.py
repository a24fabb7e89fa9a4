"""The hash by which CI knows that a build with CUDA passed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.14.1"


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """.ci/cuda_record.py as a module, for a small tree in place of the project."""
    spec = importlib.util.spec_from_file_location("cuda_record", ROOT / ".ci/cuda_record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("csrc/core/a.cpp", "csrc/kernels/b.cu", "setup.py", ".ci/cuda"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}\n")
    monkeypatch.setattr(module, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(module, "RECORD", tmp_path / "tree/.ci/cuda-build.json")
    return module


@pytest.mark.parametrize("name", ["csrc/core/a.cpp", "csrc/kernels/b.cu", "setup.py", ".ci/cuda"])
def test_any_change_changes_the_hash(record: ModuleType, name: str) -> None:
    path = record.ROOT / name
    first = record.digest(record.ROOT, TORCH)
    text = path.read_text()
    path.write_text(text + " ")
    changed = record.digest(record.ROOT, TORCH)
    path.unlink()
    gone = record.digest(record.ROOT, TORCH)
    path.with_name("other").write_text(text)
    renamed = record.digest(record.ROOT, TORCH)
    assert len({first, changed, gone}) == 3
    if name.startswith("csrc"):
        assert renamed not in {first, changed, gone}
    path.write_text(text)
    path.with_name("other").unlink()
    assert record.digest(record.ROOT, TORCH) == first


def test_what_moves_from_one_file_to_the_next_changes_the_hash(record: ModuleType) -> None:
    a, b = (record.ROOT / "csrc/core" / name for name in ("a.cpp", "b.cpp"))
    a.write_text("xy")
    b.write_text("z")
    first = record.digest(record.ROOT, TORCH)
    a.write_text("x")
    b.write_text("yz")
    assert record.digest(record.ROOT, TORCH) != first


def test_another_torch_changes_the_hash(record: ModuleType) -> None:
    assert record.digest(record.ROOT, TORCH) != record.digest(record.ROOT, "torch==2.15.0")


def test_neither_order_nor_junk_nor_other_files_change_the_hash(
    record: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = record.digest(record.ROOT, TORCH)
    for name in ("csrc/__pycache__/a.pyc", "csrc/build/a.o", "csrc/.a.cpp.swp", "README.md"):
        (record.ROOT / name).parent.mkdir(exist_ok=True)
        (record.ROOT / name).write_text("junk")
    assert record.digest(record.ROOT, TORCH) == first
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *args: reversed(list(listed(*args))))
    assert record.digest(record.ROOT, TORCH) == first


def test_it_covers_what_this_project_compiles(record: ModuleType) -> None:
    covered = {str(path) for path in record.files(ROOT)}
    compiled = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()}
    assert compiled | {"setup.py", ".ci/cuda", ".ci/cuda_record.py"} <= covered


def test_only_the_recorded_sources_pass(
    record: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="no build with CUDA is recorded"):
        record.check(TORCH)
    record.write(TORCH, "2.14.1+cu130", "nvcc V13.0.88")
    record.check(TORCH)
    assert re.fullmatch(
        r"these sources passed on \d{4}-\d\d-\d\d with torch 2\.14\.1\+cu130 and nvcc V13\.0\.88\n",
        capsys.readouterr().out,
    )
    (record.ROOT / "csrc/core/a.cpp").write_text("changed")
    with pytest.raises(SystemExit, match="other sources than these passed on"):
        record.check(TORCH)

"""The sources that .ci/cuda last passed with, as a hash in .ci/cuda-build.json.

python3 .ci/cuda_record.py check REQUIREMENT          exit status 0 if the sources here are those
python3 .ci/cuda_record.py write REQUIREMENT TORCH NVCC

REQUIREMENT is what pip was asked for; TORCH and NVCC say what was used, for people.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / ".ci" / "cuda-build.json"
INPUTS = (
    "csrc",
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    ".ci/cuda",
    ".ci/cuda_record.py",
    "tests/cuda/machine_code.py",
)
JUNK = {"__pycache__", "build"}


def files(root: Path) -> Iterator[Path]:
    """Yields the files under ``INPUTS`` in a fixed order, relative to ``root``.

    Committed or not, for setup.py compiles whatever is in its folders.
    """
    for name in INPUTS:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            inside = path.relative_to(top).parts
            if path.is_file() and not any(p in JUNK or p.startswith(".") for p in inside):
                yield path.relative_to(root)


def digest(root: Path, requirement: str) -> str:
    """Returns a hash over the names and contents of :func:`files` and the torch asked for."""
    whole = hashlib.sha256(requirement.encode())
    for path in files(root):
        content = hashlib.sha256((root / path).read_bytes()).hexdigest()
        whole.update(f"\0{path.as_posix()}\0{content}".encode())
    return whole.hexdigest()


def check(requirement: str) -> None:
    """Exits with what differs, unless the recorded sources are the ones here."""
    if not RECORD.exists():
        sys.exit("no build with CUDA is recorded")
    recorded = json.loads(RECORD.read_text())
    used = "passed on {date} with torch {torch} and {nvcc}".format_map(recorded)
    if recorded["sources"] != digest(ROOT, requirement):
        sys.exit(f"other sources than these {used}")
    print(f"these sources {used}")


def write(requirement: str, torch: str, nvcc: str) -> None:
    """Records that the sources here passed today."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    sources = digest(ROOT, requirement)
    record = {"sources": sources, "date": today, "torch": torch, "nvcc": nvcc}
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    {"check": check, "write": write}[sys.argv[1]](*sys.argv[2:])

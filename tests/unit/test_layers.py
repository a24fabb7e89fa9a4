"""Imports go one way: `wrap -> ddp -> engine`, `bind -> torch -> shm -> kernels -> core`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON_LAYERS = ("plan", "engine", "ddp", "wrap")  # lowest first
CXX_LAYERS = ("core", "kernels", "shm", "torch", "bind")
FOREIGN = re.compile(r"<(torch|ATen|c10|pybind11|Python\.h|caffe2)\b")


def modules(package: Path) -> dict[str, Path]:
    """Lists a package's modules by name, such as `fastddp.engine.python`."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports(source: str, known: Mapping[str, Path]) -> set[str]:
    """Lists the known modules that a source imports, also inside functions."""
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, or this test would not see them"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                named.add(submodule if submodule in known else str(node.module))
    return named & known.keys()


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Lists what a module imports, directly or through others."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        for name in graph[todo.pop()] - seen:
            seen.add(name)
            todo.append(name)
    return seen


def upward_imports(package: Path) -> Iterator[str]:
    """Yields each module of a layer that reaches a higher layer, or itself."""
    known = modules(package)
    graph = {name: imports(path.read_text(), known) for name, path in known.items()}

    def layer(name: str) -> str:
        return name.split(".")[1] if "." in name else ""

    for name in known:
        below = reachable(graph, name)
        if name in below:
            yield f"{name} imports itself through others"
        for lower, higher in combinations(PYTHON_LAYERS, 2):
            if layer(name) == lower:
                yield from (f"{name} reaches {n}" for n in sorted(below) if layer(n) == higher)


def upward_includes(csrc: Path) -> Iterator[str]:
    """Yields each include of a higher folder, of nothing, or of torch or Python from below."""
    for path in sorted(p for p in csrc.rglob("*") if p.is_file()):
        folder = path.parent.name
        for line in re.findall(r"^\s*#\s*include\s*(\S+)", path.read_text(), re.MULTILINE):
            place = f"{path.relative_to(csrc)} includes {line}"
            if line.startswith('"'):
                target = csrc / line.strip('"')
                if not target.is_file():
                    yield f"{place}, which does not exist"
                elif CXX_LAYERS.index(target.parent.name) > CXX_LAYERS.index(folder):
                    yield place
            elif folder in ("core", "kernels") and FOREIGN.match(line):
                yield place


def test_python_imports_go_downward() -> None:
    assert {"fastddp.plan", "fastddp.engine", "fastddp.ddp", "fastddp.wrap"} <= modules(
        ROOT / "fastddp"
    ).keys()
    assert list(upward_imports(ROOT / "fastddp")) == []


def test_cxx_includes_go_downward() -> None:
    assert list(upward_includes(ROOT / "csrc")) == []


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"plan": "import fastddp.wrap", "wrap": ""}, "fastddp.plan reaches fastddp.wrap"),
        (
            {
                "plan": "def f():\n  from fastddp import util",
                "util": "import fastddp.ddp",
                "ddp": "",
            },
            "fastddp.plan reaches fastddp.ddp",
        ),
        ({"a": "import fastddp.b", "b": "import fastddp.a"}, "fastddp.a imports itself"),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, files: dict[str, str], found: str) -> None:
    package = tmp_path / "fastddp"
    package.mkdir()
    for name, source in files.items():
        (package / f"{name}.py").write_text(source)
    assert any(found in line for line in upward_imports(package))


@pytest.mark.parametrize(
    "line", ['#include "bind/b.h"', '#include "core/gone.h"', "#include <ATen/core/Tensor.h>"]
)
def test_an_upward_include_is_found(tmp_path: Path, line: str) -> None:
    for name in ("core", "bind"):
        (tmp_path / name).mkdir()
    (tmp_path / "bind" / "b.h").write_text("")
    (tmp_path / "core" / "a.h").write_text(line)
    assert len(list(upward_includes(tmp_path))) == 1


@pytest.mark.parametrize("build_file", ["setup.py", "CMakeLists.txt"])
def test_both_builds_compile_every_source(build_file: str) -> None:
    patterns = re.findall(r"csrc/\w+/\*\.cpp", (ROOT / build_file).read_text())
    compiled = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert compiled == set((ROOT / "csrc").rglob("*.cpp"))
    assert compiled


def test_csrc_holds_only_sources_in_its_four_folders() -> None:
    files = [path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.*")]
    kinds = {".h", ".cpp", ".cu", ".cuh"}
    strays = [p for p in files if str(p.parent) not in CXX_LAYERS or p.suffix not in kinds]
    assert strays == []
    # CUDA kernels are for nvcc, which compiles csrc/kernels only.
    assert [p for p in files if p.suffix == ".cu" and str(p.parent) != "kernels"] == []


def test_no_two_sources_make_the_same_object() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in (".cpp", ".cu")]
    assert len({path.with_suffix("") for path in sources}) == len(sources)

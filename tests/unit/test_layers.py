"""Imports go one way between the packages of `fastddp/` and `benchmarks/`, and in `csrc/`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What each package may import besides itself. docs/design.md has the picture.
PYTHON_LAYERS: dict[str, set[str]] = {
    "base": set(),
    "watch": {"base"},
    "timeline": {"base", "watch"},
    "device": {"base"},
    "comm": {"base", "watch", "device"},
    "engine": {"base", "watch", "device", "comm"},
    "ddp": {"base", "watch", "device", "comm", "engine"},
    "data": {"base", "comm"},
    "data_parallel": {"base", "device", "engine"},
    "integrations": {"ddp"},
    "top": {
        "base",
        "watch",
        "timeline",
        "device",
        "comm",
        "engine",
        "ddp",
        "data",
        "data_parallel",
        "integrations",
    },
}
# The files beside the packages: at the bottom what all may import, at the top what nobody imports.
FILES = {
    **dict.fromkeys(("_build_info", "config", "errors", "extension", "version"), "base"),
    **dict.fromkeys(("__init__", "__main__", "installed"), "top"),
}

BENCHMARK_LAYERS: dict[str, set[str]] = {
    "top": set(),
    "common": set(),
    "step": {"common"},
    "startup": {"common", "step"},
    "allreduce": {"common"},
    "gpu": {"common", "step"},
    "hosts": {"common", "step", "allreduce"},
    "compare": {"common"},
}

LAYERS = {"fastddp": PYTHON_LAYERS, "benchmarks": BENCHMARK_LAYERS}

CXX_LAYERS: dict[str, set[str]] = {
    "core": set(),
    "kernels": {"core"},
    "shm": {"core", "kernels"},
    "tensor": {"core", "kernels"},
    "reducer": {"core", "kernels", "shm", "tensor"},
    "backend": {"core", "kernels", "shm", "tensor"},
    "bind": {"core", "kernels", "shm", "tensor", "reducer", "backend"},
}
TORCH_FREE = ("core", "kernels", "shm")
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


def python_layer(name: str) -> str:
    """Returns the layer of a module such as `fastddp.engine.python`, or "" if it has none."""
    package, *parts = name.split(".")
    first = parts[0] if parts else "__init__"
    layer = FILES.get(first, first)
    return layer if layer in LAYERS[package] else ""


def wrong_imports(package: Path) -> Iterator[str]:
    """Yields each module without a layer, each wrong import, and each module in a circle."""
    known = modules(package)
    layers = LAYERS[package.name]
    graph = {name: imports(path.read_text(), known) for name, path in known.items()}
    for name in known:
        layer = python_layer(name)
        if not layer:
            yield f"{name} is in no layer"
        if name in reachable(graph, name):
            yield f"{name} imports itself through others"
        allowed = {layer} | layers.get(layer, set())
        yield from (f"{name} imports {n}" for n in graph[name] if python_layer(n) not in allowed)


def wrong_includes(csrc: Path) -> Iterator[str]:
    """Yields each include of a wrong folder, of nothing, or of torch or Python from below."""
    for path in sorted(p for p in csrc.rglob("*") if p.is_file()):
        folder = path.relative_to(csrc).parts[0]
        if folder not in CXX_LAYERS:
            yield f"{path.relative_to(csrc)} is in no layer"
            continue
        for line in re.findall(r"^\s*#\s*include\s*(\S+)", path.read_text(), re.MULTILINE):
            place = f"{path.relative_to(csrc)} includes {line}"
            if line.startswith('"'):
                target = Path(line.strip('"'))
                if not (csrc / target).is_file():
                    yield f"{place}, which does not exist"
                elif target.parts[0] not in CXX_LAYERS[folder] | {folder}:
                    yield place
            elif folder in TORCH_FREE and FOREIGN.match(line):
                yield place


def sources() -> list[Path]:
    return [path for path in (ROOT / "csrc").rglob("*.*") if path.is_file()]


def test_layers_have_no_circle() -> None:
    for layers in (PYTHON_LAYERS, BENCHMARK_LAYERS, CXX_LAYERS):
        below: set[str] = set()
        for layer, allowed in layers.items():
            assert allowed <= below, layer
            below.add(layer)


@pytest.mark.parametrize("package", LAYERS)
def test_python_imports_go_downward(package: str) -> None:
    layers = {python_layer(name) for name in modules(ROOT / package)}
    assert layers == LAYERS[package].keys()
    assert list(wrong_imports(ROOT / package)) == []


def test_cxx_includes_go_downward() -> None:
    folders = {path.relative_to(ROOT / "csrc").parts[0] for path in sources()}
    assert folders == CXX_LAYERS.keys()
    assert list(wrong_includes(ROOT / "csrc")) == []


@pytest.mark.parametrize(
    ("layer", "other"),
    [(a, b) for a in PYTHON_LAYERS for b in PYTHON_LAYERS if b not in PYTHON_LAYERS[a] | {a}],
)
def test_a_wrong_import_is_found(tmp_path: Path, layer: str, other: str) -> None:
    module = {"base": "config", "top": "installed"}
    importer, imported = (module.get(name, f"{name}.inside.module") for name in (layer, other))
    for name, source in ((imported, ""), (importer, f"def f():\n  import fastddp.{imported}")):
        path = tmp_path / "fastddp" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (tmp_path / "fastddp" / "__init__.py").write_text("")
    found = list(wrong_imports(tmp_path / "fastddp"))
    assert found == [f"fastddp.{importer} imports fastddp.{imported}"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            {"device/a": "import fastddp.device.b", "device/b": "from fastddp.device import a"},
            "fastddp.device.a imports itself",
        ),
        ({"errors": "from fastddp import installed", "installed": ""}, "fastddp.errors imports"),
        ({"stray": ""}, "fastddp.stray is in no layer"),
    ],
)
def test_a_circle_and_a_stray_are_found(tmp_path: Path, files: dict[str, str], found: str) -> None:
    package = tmp_path / "fastddp"
    for name, source in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text(source)
    assert any(found in line for line in wrong_imports(package))


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        *((a, f'#include "{b}/b.h"') for a in CXX_LAYERS for b in CXX_LAYERS
          if b not in CXX_LAYERS[a] | {a}),
        *((a, "#include <ATen/core/Tensor.h>") for a in TORCH_FREE),
        *((a, "#include <Python.h>") for a in TORCH_FREE),
        ("bind", '#include "core/gone.h"'),
    ],
)  # fmt: skip
def test_a_wrong_include_is_found(tmp_path: Path, folder: str, line: str) -> None:
    for name in CXX_LAYERS:
        (tmp_path / name / "inside").mkdir(parents=True)
        (tmp_path / name / "b.h").write_text("")
    source = tmp_path / folder / "inside" / "a.h"
    source.write_text(line)
    (found,) = wrong_includes(tmp_path)
    assert found.startswith(f"{folder}/inside/a.h includes")


@pytest.mark.parametrize("build_file", ["setup.py", "CMakeLists.txt"])
def test_both_builds_compile_every_source(build_file: str) -> None:
    text = (ROOT / build_file).read_text()
    patterns = re.findall(r"csrc/[\w*/]+\.cpp", text)
    if build_file == "CMakeLists.txt":
        assert re.findall(r"file\(GLOB (\w+)[^)]*csrc/[^)]*\.cpp", text) == []
        patterns = [pattern.replace("*.cpp", "**/*.cpp") for pattern in patterns]  # GLOB_RECURSE
    compiled = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert compiled == set((ROOT / "csrc").rglob("*.cpp"))
    assert compiled


def test_csrc_holds_only_sources() -> None:
    files = [path.relative_to(ROOT / "csrc") for path in sources()]
    assert [p for p in files if p.suffix not in {".h", ".cpp", ".cu", ".cuh"}] == []
    # CUDA kernels are for nvcc, which compiles csrc/kernels only.
    assert [p for p in files if p.suffix == ".cu" and str(p.parent) != "kernels"] == []


def test_no_two_sources_make_the_same_object() -> None:
    compiled = [path for path in sources() if path.suffix in (".cpp", ".cu")]
    assert len({path.with_suffix("") for path in compiled}) == len(compiled)


CXX_TYPE = re.compile(r"(?:class|struct|enum class|union) (\w+)(?: final)?(?: :.*| \{)?$")


def types(source: str) -> Iterator[str]:
    """Yields the types that a C++ source defines for all others, such as `fastddp::shm::Group`."""
    around: list[str] = []
    for line in source.splitlines():
        if line.startswith("namespace"):
            around.append(line.removeprefix("namespace").removesuffix("{").strip())
        elif line.startswith("}  // namespace"):
            around.pop()
        elif "" not in around and (found := CXX_TYPE.match(line)):  # "" is an anonymous one
            yield "::".join([*around, found[1]])


def test_no_two_cxx_types_have_one_name() -> None:
    # The linker keeps one destructor of the two, for both. No compiler sees it.
    found = [name for path in sources() for name in types(path.read_text())]
    assert len(found) > 50
    assert sorted({name for name in found if found.count(name) > 1}) == []


def test_two_cxx_types_with_one_name_are_found() -> None:
    source = """
namespace fastddp::shm {
namespace {

struct Hidden {
};

}  // namespace

class Seen final : public Base {
};

struct Declared;

}  // namespace fastddp::shm
"""
    assert list(types(source)) == ["fastddp::shm::Seen"]

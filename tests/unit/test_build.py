"""What setup.py builds, refuses and records, and what the package makes of the record."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastddp import extension
from fastddp.engine.choose import choose
from fastddp.extension import BuildInfo

ROOT = Path(__file__).resolve().parents[2]

# A module that needs neither torch nor pybind11, so that it compiles in a second.
TINY_SOURCES = {
    "csrc/core/answer.h": "int answer();\n",
    "csrc/core/answer.cpp": '#include "core/answer.h"\nint answer() { return 42; }\n',
    "csrc/bind/module.cpp": """
#include <Python.h>
#include "core/answer.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C"};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", answer());
  return module;
}
""",
}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module; its main() does not run."""
    spec = importlib.util.spec_from_file_location("fastddp_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project with a tiny extension, never built."""
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    shutil.copytree(ROOT / "fastddp", tree / "fastddp", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name, text in TINY_SOURCES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    return tree


def install(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Installs a copy of the project, without dependencies, into its folder `site`."""
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--upgrade", "--target", str(tree / "site"), str(tree)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTDDP_")} | environment
    return subprocess.run(command, env=env, cwd=tree, capture_output=True, text=True)


def recorded(tree: Path) -> dict[str, str | None]:
    return runpy.run_path(str(tree / "site" / "fastddp" / "_build_info.py"))


def run_installed(tree: Path, code: str) -> str:
    """Runs code with the copy's installed package, away from every source tree."""
    env = dict(os.environ, PYTHONPATH=str(tree / "site"))
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=env, cwd=tree / "site", capture_output=True, text=True, check=True
    ).stdout.strip()


# ---- settings ----


def test_the_first_allowed_value_is_the_default(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTDDP_BUILD", raising=False)
    assert build.setting("FASTDDP_BUILD", "auto", "require", "0") == "auto"
    monkeypatch.setenv("FASTDDP_BUILD", "require")
    assert build.setting("FASTDDP_BUILD", "auto", "require", "0") == "require"


def test_an_unknown_setting_names_the_allowed_ones() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        env=dict(os.environ, FASTDDP_BUILD="yes"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "FASTDDP_BUILD='yes' is not one of auto, require, 0" in done.stderr


def test_a_missing_compiler_is_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.CannotBuildError, match=r"no-such-compiler.*install g\+\+"):
        build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.CannotBuildError, match=r"looked for c\+\+, g\+\+, clang\+\+"):
        build.find_compiler()


# ---- CUDA ----


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit folder whose nvcc, of CUDA 12.8, says that it really lives elsewhere."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    program = home / "bin" / "nvcc"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '  --version) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;\n'
        f'  --dryrun) echo "#$ TOP={tmp_path}/really/here" >&2 ;;\n'
        "  --list-gpu-arch) echo compute_70; echo compute_75; echo compute_86; echo compute_90 ;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.delenv("FASTDDP_CUDA", raising=False)
    return tmp_path / "really" / "here"


@pytest.mark.parametrize(
    ("torch_cuda", "kernels", "why"),
    [
        ("12.8", [], r"there is no \.cu file in csrc/kernels; get"),
        ("13.0", ["k.cu"], r"nvcc \(.*\) is of CUDA 12\.8 and torch of CUDA 13\.0; set CUDA_HOME"),
    ],
)
@pytest.mark.usefixtures("nvcc")
def test_impossible_cuda_is_recorded_or_an_error_when_asked_for(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    torch_cuda: str,
    kernels: list[str],
    why: str,
) -> None:
    record = build.Record()
    assert build.choose_cuda(torch_cuda, kernels, record) is None
    assert re.match(why, record.NO_CUDA)
    monkeypatch.setenv("FASTDDP_CUDA", "1")
    with pytest.raises(SystemExit, match=f"FASTDDP_CUDA=1, but {why}"):
        build.choose_cuda(torch_cuda, kernels, record)


@pytest.mark.usefixtures("nvcc")
def test_cuda_is_not_missed_in_a_cpu_build_of_torch(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = build.Record()
    assert build.choose_cuda(None, ["k.cu"], record) is None
    assert record.NO_CUDA is None
    monkeypatch.setenv("FASTDDP_CUDA", "1")
    with pytest.raises(SystemExit, match="torch is not a CUDA build; install one"):
        build.choose_cuda(None, ["k.cu"], record)


def test_cuda_without_nvcc_is_recorded_or_an_error_when_asked_for(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    monkeypatch.delenv("FASTDDP_CUDA", raising=False)
    record = build.Record()
    assert build.choose_cuda("13.0", ["k.cu"], record) is None
    assert record.NO_CUDA.startswith("nvcc was not found; install the toolkit of CUDA 13.0")
    monkeypatch.setenv("FASTDDP_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found"):
        build.choose_cuda("13.0", ["k.cu"], record)


def test_nvcc_says_where_the_toolkit_is_and_what_it_compiles_for(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, nvcc: Path
) -> None:
    record = build.Record()
    # Another minor version will do.
    toolkit = build.choose_cuda("12.6", ["k.cu"], record)
    assert toolkit == (str(nvcc), "12.8", "7.5;8.6;9.0+PTX")
    assert record.NO_CUDA is None
    monkeypatch.setenv("FASTDDP_CUDA", "0")
    assert build.choose_cuda("12.6", ["k.cu"], record) is None
    assert record.NO_CUDA == "FASTDDP_CUDA=0 asked for none; unset it"


# ---- the record, and what the package makes of it ----


def test_the_record_is_read_back(build: ModuleType, tmp_path: Path) -> None:
    record = build.Record(TORCH="2.13.0", COMPILER='g++ "12"', FAILED="it's\nlong")
    record.write(tmp_path)
    read = runpy.run_path(str(tmp_path / "_build_info.py"))
    names = [name.upper() for name in BuildInfo._fields]
    assert [read[name] for name in names] == ["2.13.0", None, None, 'g++ "12"', "it's\nlong", None]


def test_the_record_of_an_older_source_tree_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    older = ModuleType("fastddp._build_info")
    older.TORCH, older.FAILED = "2.13.0", "no g++"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, older.__name__, older)
    assert extension.build_info() == BuildInfo("2.13.0", None, None, None, "no g++", None)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, BuildInfo | None]]:
    """What the package believes was recorded; also forgets what it has found out so far."""
    slot: dict[str, BuildInfo | None] = {"built": None}
    monkeypatch.setattr(extension, "build_info", lambda: slot["built"])
    extension._find.cache_clear()
    extension.warn_once.cache_clear()
    yield slot
    extension._find.cache_clear()
    extension.warn_once.cache_clear()


def test_an_extension_for_another_torch_is_never_opened(
    record: dict[str, BuildInfo | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> ModuleType:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(importlib, "import_module", refuse)
    record["built"] = BuildInfo("1.2.3+cu99", None, None, "g++", None)
    assert extension.load() is None
    why = str(extension.why_not())
    assert f"built for torch 1.2.3+cu99 and this is torch {torch.__version__}" in why
    assert "pip install --no-build-isolation" in why


def test_an_extension_that_cannot_be_opened_is_a_reason(
    record: dict[str, BuildInfo | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(importlib, "import_module", fail)
    record["built"] = BuildInfo(str(torch.__version__), None, None, "g++", None)
    assert extension.load() is None
    assert "fastddp._C: undefined symbol" in str(extension.why_not())


@pytest.mark.parametrize(
    ("built", "why"),
    [
        (None, "never built; install g++"),
        (
            BuildInfo(None, None, None, None, "no g++; install g++"),
            "not built: no g++; install g++",
        ),
    ],
)
def test_an_unbuilt_extension_says_the_next_step(
    record: dict[str, BuildInfo | None], built: BuildInfo | None, why: str
) -> None:
    record["built"] = built
    assert why in str(extension.why_not())
    assert "then run `pip install --no-build-isolation .`" in str(extension.why_not())


@pytest.mark.usefixtures("record")
def test_the_choice_of_the_slower_engine_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTDDP_ENGINE", raising=False)
    with pytest.warns(RuntimeWarning, match=r"slower.*GIL|never built"):
        assert choose() == "python"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose() == "python"


# ---- whole installs ----


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_failed_build_still_installs_and_is_remembered(tree: Path) -> None:
    (tree / "csrc/bind/module.cpp").write_text("#error broken on purpose\n")
    done = install(tree)
    assert done.returncode == 0, done.stdout
    assert (done.stdout + done.stderr).count("installed WITHOUT its compiled extension") == 1
    assert str(recorded(tree)["FAILED"]).startswith("compiling failed")
    code = "import fastddp.extension as e; print(e.load(), e.why_not())"
    assert run_installed(tree, code).startswith(
        "None the extension was not built: compiling failed"
    )

    done = install(tree, FASTDDP_BUILD="require")
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_a_compiler_the_install_is_pure_python(tree: Path) -> None:
    done = install(tree, CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout
    assert "no-such-compiler" in str(recorded(tree)["FAILED"])
    code = "from fastddp.engine.choose import choose; print(choose())"
    assert run_installed(tree, code) == "python"

    done = install(tree, CXX="no-such-compiler", FASTDDP_BUILD="require")
    assert done.returncode != 0
    assert "FASTDDP_BUILD=require, but no C++ compiler was found" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_second_build_compiles_only_what_changed(tree: Path) -> None:
    def compiled_at() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tree.glob("build/objects-*/**/*.o")}

    code = "import fastddp.extension as e; print(e.load().answer)"
    assert install(tree, FASTDDP_BUILD="require").returncode == 0
    assert run_installed(tree, code) == "42"
    first = compiled_at()
    assert first.keys() == {"answer.o", "module.o"}

    assert install(tree, FASTDDP_BUILD="require").returncode == 0
    assert compiled_at() == first

    answer = tree / "csrc/core/answer.cpp"
    answer.write_text(answer.read_text().replace("42", "43"))
    assert install(tree, FASTDDP_BUILD="require").returncode == 0
    second = compiled_at()
    assert [name for name in first if first[name] != second[name]] == ["answer.o"]
    assert run_installed(tree, code) == "43"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_pure_install_leaves_an_earlier_build_behind(tree: Path) -> None:
    assert install(tree, FASTDDP_BUILD="require").returncode == 0
    shutil.copytree(tree / "site" / "fastddp", tree / "fastddp", dirs_exist_ok=True)
    shutil.rmtree(tree / "site")
    assert install(tree, FASTDDP_BUILD="0").returncode == 0
    assert not list((tree / "site").rglob("*.so"))
    assert "FASTDDP_BUILD=0" in str(recorded(tree)["FAILED"])
    assert (tree / "site/fastddp/py.typed").exists()
    assert (tree / "site/fastddp/_C.pyi").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.version.cuda is None, reason="torch is not a CUDA build")
@pytest.mark.usefixtures("nvcc")
def test_another_cuda_than_torchs_installs_without_kernels_and_says_so(tree: Path) -> None:
    assert not str(torch.version.cuda).startswith("12."), "the posing nvcc must be of another"
    (tree / "csrc/kernels").mkdir()
    (tree / "csrc/kernels/kernel.cu").write_text("__global__ void kernel() {}\n")
    done = install(tree, FASTDDP_BUILD="require")
    assert done.returncode == 0, done.stdout
    assert (done.stdout + done.stderr).count("installed WITHOUT its CUDA kernels") == 1
    assert "is of CUDA 12.8 and torch of CUDA" in str(recorded(tree)["NO_CUDA"])
    assert run_installed(tree, "import fastddp.extension as e; print(e.load().answer)") == "42"

    done = install(tree, FASTDDP_CUDA="1")
    assert done.returncode != 0
    assert "FASTDDP_CUDA=1, but nvcc" in done.stdout + done.stderr

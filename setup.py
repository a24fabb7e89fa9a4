"""Build of fastddp and of its optional compiled extension, ``fastddp._C``.

Everything else about the package is in pyproject.toml. The environment decides what is built:

FASTDDP_BUILD=auto      (default) try; on failure install without the extension and record why
FASTDDP_BUILD=require   a failed or impossible build is an error
FASTDDP_BUILD=0         pure Python
FASTDDP_CUDA=auto       (default) CUDA kernels when torch is a CUDA build and an nvcc of its major
                        version is found; else none, and why is recorded
FASTDDP_CUDA=1          their absence is an error
FASTDDP_CUDA=0          none
TORCH_CUDA_ARCH_LIST    default: those of DEFAULT_ARCHS that nvcc knows (torch asks a GPU)

The extension only works with the torch it was compiled against. That is why torch is not a build
requirement (pip would fetch another one into its build environment) and why its version is recorded
in ``fastddp/_build_info.py``, which the package reads before it loads anything.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
CXX_SOURCES = "csrc/**/*.cpp"
CUDA_SOURCES = "csrc/kernels/*.cu"
DEFAULT_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0;12.0"
# Bit equality with torch: no fused multiply-add where the source has a multiply and an add.
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"]
NVCC_FLAGS = [
    "-O3",
    "-lineinfo",
    "-fmad=false",
    "-Xcompiler=-fvisibility=hidden,-ffp-contract=off",
    "-Xfatbin=-compress-all",  # 1 MB of kernels for all architectures, where 19 MB were
]


class CannotBuildError(Exception):
    """Why something cannot be built here; ends with what to do before building again."""


@dataclass
class Record:
    """The contents of ``fastddp/_build_info.py``, for pip hides what a build prints."""

    TORCH: str | None = None
    CUDA: str | None = None
    ARCHS: str | None = None
    COMPILER: str | None = None
    FAILED: str | None = "the build did not finish"
    NO_CUDA: str | None = None
    """Why there are no CUDA kernels although torch is a CUDA build."""

    def write(self, package: Path) -> None:
        lines = "".join(f"{name} = {value!r}\n" for name, value in asdict(self).items())
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.py").write_text(f"# Written by setup.py.\n{lines}")


def setting(name: str, *allowed: str) -> str:
    """Returns the environment variable ``name``; the first allowed value is the default."""
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise SystemExit(f"fastddp: {name}={value!r} is not one of {', '.join(allowed)}")
    return value


def find_torch() -> ModuleType:
    """Imports the torch of the environment that is installed into."""
    # pip's isolated build hides that environment's site-packages; sysconfig still names it.
    for key in ("purelib", "platlib"):
        site = sysconfig.get_path(key)
        if site not in sys.path and Path(site, "torch").is_dir():
            sys.path.append(site)
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise CannotBuildError(
            f"torch cannot be imported while building ({error}); install torch"
        ) from None


def find_compiler() -> str:
    """Finds the C++ compiler and makes it the one that torch and setuptools use."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    command = next((name for name in names if shutil.which(shlex.split(name)[0])), None)
    if command is None:
        raise CannotBuildError(
            f"no C++ compiler was found (looked for {', '.join(names)}); install g++"
            " (Debian, Ubuntu: apt-get install g++) or set CXX"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise CannotBuildError(
            f"Python.h is not in {headers}; install Python's headers"
            " (Debian, Ubuntu: apt-get install python3-dev)"
        )
    os.environ["CXX"] = command
    return command


def output(*command: str) -> str:
    """Returns what a command prints, to either stream."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout


class Toolkit(NamedTuple):
    """The CUDA toolkit to compile with."""

    home: str
    release: str
    """Such as ``13.0``."""
    archs: str
    """What to compile for unless the environment says it, as in TORCH_CUDA_ARCH_LIST."""


def find_cuda(torch_cuda: str | None, kernels: list[str]) -> Toolkit:
    """Finds a CUDA toolkit of the major version that torch was built with."""
    if torch_cuda is None:
        raise CannotBuildError("the installed torch is not a CUDA build; install one that is")
    if not kernels:
        raise CannotBuildError("there is no .cu file in csrc/kernels; get the complete source tree")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise CannotBuildError(
            f"nvcc was not found; install the toolkit of CUDA {torch_cuda} or set CUDA_HOME to it"
        )
    found = re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version"))
    major, release = (found[1], f"{found[1]}.{found[2]}") if found else (None, "unknown")
    if major != torch_cuda.partition(".")[0]:
        raise CannotBuildError(
            f"nvcc ({nvcc}) is of CUDA {release} and torch of CUDA {torch_cuda};"
            " set CUDA_HOME to a toolkit with torch's major version"
        )
    # Ask nvcc where it lives: a wrapper or link on PATH misleads torch's own guess.
    dry_run = output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
    top = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    home = os.path.realpath(top[1].strip() if top else Path(nvcc).resolve().parent.parent)
    known = re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch"))
    archs = ";".join(arch for arch in DEFAULT_ARCHS.split(";") if arch.replace(".", "") in known)
    return Toolkit(home, release, f"{archs}+PTX")


def choose_cuda(torch_cuda: str | None, kernels: list[str], record: Record) -> Toolkit | None:
    """Returns the toolkit to compile the kernels with, or None; the record then says why."""
    wanted = setting("FASTDDP_CUDA", "auto", "0", "1")
    if wanted == "0":
        why = "FASTDDP_CUDA=0 asked for none; unset it"
    else:
        try:
            return find_cuda(torch_cuda, kernels)
        except CannotBuildError as error:
            why = str(error)
        if wanted == "1":
            raise SystemExit(f"fastddp: FASTDDP_CUDA=1, but {why}")
    if torch_cuda is not None:  # nobody misses them in a CPU build
        record.NO_CUDA = why
    return None


def sources(pattern: str) -> list[str]:
    """Lists sources relative to this folder, as setuptools demands."""
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern))


def describe_extension(record: Record) -> Extension:
    """Fills in the record and returns the extension, or raises CannotBuildError."""
    cpp, cu = sources(CXX_SOURCES), sources(CUDA_SOURCES)
    if not cpp:
        raise CannotBuildError("there is no C++ source under csrc/; get the complete source tree")
    torch = find_torch()
    compiler = find_compiler()
    toolkit = choose_cuda(torch.version.cuda, cu, record)
    record.TORCH = str(torch.__version__)
    record.COMPILER = output(*shlex.split(compiler), "--version").partition("\n")[0]
    includes = [str(HERE / "csrc")]
    if toolkit is None:
        from torch.utils.cpp_extension import CppExtension

        return CppExtension("fastddp._C", cpp, include_dirs=includes, extra_compile_args=CXX_FLAGS)

    os.environ["CUDA_HOME"] = toolkit.home  # read when torch.utils.cpp_extension is imported
    if len(shlex.split(compiler)) == 1:  # nvcc takes no `ccache g++` for the host's part
        os.environ.setdefault("NVCC_CCBIN", compiler)
    record.CUDA = toolkit.release
    record.ARCHS = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", toolkit.archs)
    from torch.utils.cpp_extension import CUDAExtension

    # Headers that a toolkit may lack and torch's own wheels carry (cusparse.h, nccl.h, ...).
    site = Path(torch.__file__).parent.parent
    wheels = [str(folder) for folder in sorted(site.glob("nvidia/*/include"))]
    return CUDAExtension(
        "fastddp._C",
        cpp + cu,
        include_dirs=[*includes, f"{toolkit.home}/include", *wheels],
        define_macros=[("FASTDDP_CUDA", "1")],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )


def build_ext_command(record: Record, required: bool) -> type:
    """Returns the build_ext command that records how the build went."""
    try:
        import ninja

        # The virtual environment need not be activated for its ninja to be found.
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    except ImportError:
        pass
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # One folder per Python and torch, kept between builds, also for editable installs.
            tag = f"{sys.implementation.cache_tag}-torch{record.TORCH}"
            self.build_temp = str(HERE / "build" / f"objects-{tag}")
            # setuptools compares time stamps only and would ship an extension made for another
            # torch. ninja compares commands too, and compiles nothing that is up to date.
            self.force = True

        def run(self) -> None:
            inplace = self.inplace
            package = (HERE if inplace else Path(self.build_lib)) / "fastddp"
            try:
                super().run()
                record.FAILED = None
                if record.NO_CUDA is not None:
                    announce("CUDA kernels", record.NO_CUDA)
            except Exception as error:  # ninja, distutils and a missing tool raise unrelated types
                if required:
                    raise
                what = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
                record.FAILED = (
                    f"compiling failed ({what}); see the compiler's output with `pip install -v`"
                    " and fix what it names" + (" or set FASTDDP_CUDA=0" if record.CUDA else "")
                )
                announce("compiled extension", record.FAILED)
                self.inplace, self.extensions, self.distribution.ext_modules = inplace, [], []
                for stale in package.glob("_C.*.so"):
                    stale.unlink()
            record.write(package)

    return BuildExt


def build_py_command(record: Record, pure: bool) -> type:
    """Returns the build_py command that records, for a pure-Python install, why it is one."""

    class BuildPy(build_py):
        def run(self) -> None:
            super().run()
            if pure:
                record.write((HERE if self.editable_mode else Path(self.build_lib)) / "fastddp")
                announce("compiled extension", record.FAILED)

    return BuildPy


def announce(missing: str, reason: str | None) -> None:
    bar = "*" * 78
    text = f"fastddp is installed WITHOUT its {missing}: {reason}"
    print(f"\n{bar}\n{text}\n{bar}\n", file=sys.stderr, flush=True)


def main() -> None:
    mode = setting("FASTDDP_BUILD", "auto", "require", "0")
    record = Record()
    extensions = []
    commands = {}
    if mode == "0":
        record.FAILED = "FASTDDP_BUILD=0 asked for a pure-Python install; unset it"
    else:
        try:
            extensions = [describe_extension(record)]
            commands["build_ext"] = build_ext_command(record, required=mode == "require")
        except CannotBuildError as error:
            if mode == "require":
                raise SystemExit(f"fastddp: FASTDDP_BUILD=require, but {error}") from None
            record.FAILED = str(error)
    commands["build_py"] = build_py_command(record, pure=not extensions)
    setup(ext_modules=extensions, cmdclass=commands)


if __name__ == "__main__":
    main()

"""Checks what the CUDA kernels are compiled to. Needs nvcc and nvdisasm, but no GPU.

    python tests/cuda/machine_code.py --arch 80 90

Every kernel: at most MAX_REGISTERS registers, no stack frame, no spill, no local memory. Those that
move data (MOVES): 16-byte stores, 16-byte loads (of 8 bytes where elements get twice as wide), and
BYTES_IN_FLIGHT loaded before the first such store. Exits with 1 otherwise, or if a tool is missing.

nvdisasm is looked for in the CUDA toolkit, in the Python package nvidia-cuda-nvdisasm, in triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import setup  # noqa: E402  the flags and the architectures that the package is built with

MAX_REGISTERS = 64  # four blocks of 256 threads a multiprocessor
BYTES_IN_FLIGHT = 64
TYPES = {"f": 4, "d": 8, "6__half": 2, "13__nv_bfloat16": 2}
# The mangled name's first two template arguments: what it reads and what it writes. The second is a
# reference to the first (S2_) if it is the same 16-bit type.
MOVES = re.compile(r"move_kernelI(f|d|6__half|13__nv_bfloat16)(f|d|6__half|13__nv_bfloat16|S\d*_)")


def find_tool(name: str, source: str, *folders: Path) -> str:
    found = shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)
    if found is None:
        looked = ", ".join(["PATH", *map(str, folders)])
        raise SystemExit(f"{name} was not found (looked in {looked}); install {source}")
    return found


def toolkit_folders() -> list[Path]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return [Path(home, "bin")]


def package_folders() -> Iterator[Path]:
    """The folders of programs in the Python packages that carry nvdisasm."""
    for package, pattern in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield from Path(folder).glob(pattern)


def compile_cubin(nvcc: str, source: Path, arch: str, cubin: Path) -> dict[str, str]:
    """Compiles to ``cubin``; returns what ptxas says about each kernel, by mangled name."""
    command = [nvcc, "-std=c++17", *setup.NVCC_FLAGS, f"-I{ROOT / 'csrc'}", "-cubin"]
    command += [f"-arch=sm_{arch}", "-Xptxas", "-v", str(source), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{source.name} does not compile for sm_{arch}:\n{result.stderr}")
    parts = re.split(r"Compiling entry function '(\w+)'", result.stderr)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def disassemble(nvdisasm: str, cubin: Path) -> dict[str, str]:
    """Returns the instructions of each kernel, by mangled name."""
    command = [nvdisasm, "--print-code", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+),", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise SystemExit(f"ptxas does not say {pattern!r}; it says:\n{text}")
    return int(found.group(1))


def check_resources(said: str) -> Iterator[str]:
    registers = number(r"Used (\d+) registers", said)
    if registers > MAX_REGISTERS:
        yield f"{registers} registers"
    for what in ("stack frame", "spill stores", "spill loads"):
        if count := number(rf"(\d+) bytes {what}", said):
            yield f"{count} bytes {what}"


def check_local_memory(code: str) -> Iterator[str]:
    if found := re.search(r"\b(LDL|STL)\b\S*", code):
        yield f"local memory ({found.group()})"


def check_wide_accesses(name: str, code: str) -> Iterator[str]:
    types = MOVES.search(name)
    if types is None:
        return
    source, target = types.groups()
    widens = TYPES[source] < TYPES.get(target, TYPES[source])
    load_bits = 64 if widens else 128
    stores = [found.start() for found in re.finditer(r"\bSTG\.E\S*\.128\b", code)]
    if not stores:
        yield "no 128-bit store"
        return
    loads = re.findall(rf"\bLDG\.E\S*\.{load_bits}\b", code[: stores[0]])
    if len(loads) * load_bits < BYTES_IN_FLIGHT * 8:
        yield f"{len(loads)} loads of {load_bits} bits before the first 128-bit store"


def check(nvcc: str, nvdisasm: str, source: Path, arch: str) -> tuple[list[str], list[str]]:
    """Returns the names of the kernels, and what is wrong with them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        said = compile_cubin(nvcc, source, arch, cubin)
        codes = disassemble(nvdisasm, cubin)
    if not said or said.keys() != codes.keys():
        return [*said], [f"ptxas names {len(said)} kernels and nvdisasm {len(codes)}"]
    wrong = [
        f"{name}: {what}"
        for name, code in codes.items()
        for what in (
            *check_resources(said[name]),
            *check_local_memory(code),
            *check_wide_accesses(name, code),
        )
    ]
    return [*said], wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = re.findall(r"[\d.]+", setup.DEFAULT_ARCHS)
    parser.add_argument("--arch", nargs="+", default=default, help="default: %(default)s")
    parser.add_argument("sources", nargs="*", type=Path, help="default: csrc/kernels/*.cu")
    args = parser.parse_args()
    sources = args.sources or sorted(ROOT.glob("csrc/kernels/*.cu"))
    nvcc = find_tool("nvcc", "the CUDA toolkit, or set CUDA_HOME", *toolkit_folders())
    nvdisasm = find_tool(
        "nvdisasm", "nvidia-cuda-nvdisasm with pip", *toolkit_folders(), *package_folders()
    )

    num_wrong = 0
    for arch in (arch.replace(".", "") for arch in args.arch):
        names = []
        for source in sources:
            found, wrong = check(nvcc, nvdisasm, source, arch)
            names += found
            num_wrong += len(wrong)
            for line in wrong:
                print(f"FAILED sm_{arch} {source.name} {line}")
        num_moves = sum(MOVES.search(name) is not None for name in names)
        print(f"sm_{arch}: {len(names)} kernels, {num_moves} of them move data")
        if num_moves == 0:
            print(f"FAILED sm_{arch}: no kernel is named {MOVES.pattern!r}")
            num_wrong += 1
    print(f"{num_wrong} failed")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())

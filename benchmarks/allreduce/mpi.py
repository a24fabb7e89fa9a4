"""Starts ranks with mpiexec, so that MPI works in the same processes as torch.distributed.

mpiexec starts `python -m benchmarks.allreduce.mpi FOLDER` for each rank.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.ranks import rank_main, read_results

ROOT = Path(__file__).resolve().parents[2]


def find_mpiexec() -> str | None:
    """Returns the mpiexec beside the interpreter, which belongs to pip's MPI, else that on PATH."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("mpiexec", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))


def mpi_version() -> str:
    """Returns the name and version of mpi4py's MPI, such as `Open MPI 5.0.11`."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def run_ranks_under_mpi(
    function: Callable[..., Any], ranks: int, *args: Any, threads: int = 1, limit_s: float = 1800
) -> list[Any]:
    """Like `benchmarks.common.ranks.run_ranks`, but a rank's traceback goes to stderr."""
    mpiexec = find_mpiexec()
    assert mpiexec is not None, "the caller has looked for it"
    with tempfile.TemporaryDirectory(prefix="fastddp-bench-") as folder:
        (Path(folder) / "job").write_bytes(pickle.dumps((ranks, threads, function, args)))
        command = [mpiexec, *_flags(mpiexec), "-n", str(ranks)]
        command += [sys.executable, "-m", "benchmarks.allreduce.mpi", folder]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL) as process:
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                raise TimeoutError(
                    f"{ranks} ranks did not finish {function.__name__} in {limit_s:.0f} s"
                ) from None
            finally:
                _end(process)
        if code != 0:
            raise RuntimeError(f"mpiexec ended with exit code {code}; its output says why")
        return read_results(Path(folder), ranks)


def _flags(mpiexec: str) -> list[str]:
    """Returns flags by which ranks may move between cores and outnumber them, as without MPI."""
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=True)
    if "open-mpi.org" not in version.stdout:
        return []  # MPICH and its relatives do so by default
    # A container's only user may be root.
    return ["--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends mpiexec, by SIGTERM at first: an mpiexec that is killed cannot end its ranks."""
    process.terminate()  # does nothing where it has ended
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def _main(folder: Path) -> None:
    import mpi4py

    mpi4py.rc.thread_level = "funneled"  # one thread calls it, so it need not lock
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    try:
        ranks, threads, function, args = pickle.loads((folder / "job").read_bytes())
        if world.size != ranks:
            raise RuntimeError(
                f"mpiexec started {ranks} ranks, and mpi4py sees {world.size}: "
                f"{find_mpiexec()} is not of mpi4py's MPI ({MPI.get_vendor()[0]})"
            )
        rank_main(world.rank, ranks, folder, threads, function, args)
    except BaseException:
        traceback.print_exc()
        world.Abort(1)  # a mere exit would wait for the other ranks


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

"""The loops that a benchmark times without Python between two calls, compiled on first use."""

from __future__ import annotations

import fcntl
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "benchmarks"


@cache
def compiled_loops() -> Any:
    """Returns the module of `loops.cpp`: in about 40 s the first time, then in less than a second.

    It is compiled for this machine's CPU. Without its vector units the floor would not be the limit
    of the memory.
    """
    from torch.utils.cpp_extension import load

    # The virtual environment need not be activated for its ninja to be found.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        # The lock file of torch stays when a process is killed, and later ones would wait forever.
        (BUILD / "lock").unlink(missing_ok=True)
        return load(
            name="fastddp_benchmark_loops",
            sources=[str(ROOT / "benchmarks" / "allreduce" / "loops.cpp")],
            extra_cflags=["-O3", "-g0", "-march=native"],
            build_directory=str(BUILD),
        )

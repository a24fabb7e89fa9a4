"""A description of the machine and the software that a measurement was taken with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path


def describe() -> dict[str, str | int | float]:
    """Returns the machine and the versions, as plain values for a JSON record."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_kib("/proc/meminfo", "MemTotal") / 2**20, 1),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "fastddp": _version("fastddp"),
    }


def describe_gpus() -> dict[str, str | int | float]:
    """Returns the first GPU, the number of GPUs, and the versions of CUDA, driver and NCCL."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda or "none",
        "driver": _driver(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.splitlines()[0].strip()


def pss_bytes(pid: str = "self") -> int:
    """Returns a process's PSS in bytes: a page that n processes map counts as 1/n of a page."""
    return _kib(f"/proc/{pid}/smaps_rollup", "Pss") * 1024


def rss_bytes(pid: str = "self") -> int:
    """Returns a process's resident memory in bytes."""
    return _kib(f"/proc/{pid}/status", "VmRSS") * 1024


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kib(path: str, key: str) -> int:
    return int(_field(path, key).split()[0])


def _field(path: str, key: str) -> str:
    """Returns the value of the first `key: value` line of a file under /proc, or an empty text."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""

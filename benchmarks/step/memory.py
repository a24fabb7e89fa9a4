"""The peak of a process's memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.common.machine import pss_bytes


@dataclass
class Peak:
    value: int = 0


@contextmanager
def sampled_peak(every_s: float = 0.005) -> Iterator[Peak]:
    """Watches this process's PSS from a thread. The kernel records the peak of RSS only."""
    peak = Peak()
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(every_s):
            peak.value = max(peak.value, pss_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        peak.value = max(peak.value, pss_bytes())
        stop.set()
        watcher.join()

"""What a process holds of the system: descriptors, and mapped or open segments."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist


def descriptors() -> dict[int, str]:
    """Returns what each open file descriptor leads to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def mappings(what: str) -> list[str]:
    """Returns the lines of this process's mappings of ``memfd:fastddp-<what>``."""
    return re.findall(rf"^.*/memfd:fastddp-{what}\b.*$", Path("/proc/self/maps").read_text(), re.M)


def shared_files_of(pids: Collection[int]) -> list[str]:
    """Returns the files in /dev/shm that are named after these processes or after fastddp.

    Other tests run at the same time, and what they have there is none of the caller's business.
    """
    numbers = {str(pid) for pid in pids}
    return [
        name
        for name in os.listdir("/dev/shm")
        if "fastddp" in name or numbers & set(re.findall(r"\d+", name))
    ]


# Python's mmap has a descriptor of the board of its own.
KEPT = [f"/memfd:fastddp{name} (deleted)" for name in (" board", " board", " stacks", "-heap")]


@dataclass(frozen=True)
class Holdings:
    descriptors: Mapping[int, str]
    heaps: int
    """Mappings of heaps, this process's and others'."""
    groups: int
    """Mappings of groups' segments."""

    @classmethod
    def now(cls) -> Holdings:
        return cls(descriptors(), len(mappings("heap")), len(mappings("group")))

    def check_same_but_for_my_heap(self) -> None:
        """Asserts that since then this process has got what it keeps, and nothing else.

        That is one heap, one board and one file for stacks. A transport's threads may still be at
        closing what they had, and the watcher looks once per second: for them there is time.
        """
        deadline = time.monotonic() + 20
        while True:
            now = Holdings.now()
            new = [to for fd, to in now.descriptors.items() if fd not in self.descriptors]
            if len(new) <= len(KEPT) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        assert sorted(new) == KEPT, new
        assert (now.heaps, now.groups) == (1, 0), (mappings("heap"), mappings("group"))


def destroy() -> None:
    """Destroys all groups, and what is only reachable through cycles."""
    dist.destroy_process_group()
    gc.collect()

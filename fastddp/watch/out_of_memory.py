"""How often the kernel has killed a process for lack of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")


def out_of_memory_kills() -> int | None:
    """Returns how many processes were killed for lack of memory since some moment in the past.

    Counted are the processes of the control group that this process is in, or where there is none
    those of the whole machine. Two readings tell whether there was one in between. Works in any
    thread.

    Returns:
        The counter; None if the kernel does not tell.
    """
    for path in _counters():
        try:
            found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if found:
            return int(found[1])
    return None


def _counters() -> Iterator[Path]:
    """Yields files that may have the counter, the closest first."""
    for kind, root, mount in _mounts():
        file = "memory.events" if kind == "cgroup2" else "memory.oom_control"
        for inside in _groups(kind):
            # In a container the path may be that on the host, and the mount show the group itself.
            relative = inside.removeprefix(root.rstrip("/")).lstrip("/")
            yield mount / relative / file
            yield mount / file
    yield _PROC / "vmstat"


def _mounts() -> Iterator[tuple[str, str, Path]]:
    """Yields the type, the root and the place of each mount that may count memory; see proc(5)."""
    for line in _lines("self/mountinfo"):
        before, _, after = line.partition(" - ")
        places, what = before.split(" ")[3:5], after.split(" ")[:3]  # a source may be empty
        if len(places) < 2 or len(what) < 3:
            continue
        (root, mount), (kind, _, options) = places, what
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            yield kind, root, Path(mount)


def _groups(kind: str) -> Iterator[str]:
    """Yields the path of the control group that this process is in; see cgroups(7)."""
    for line in _lines("self/cgroup"):
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers if kind == "cgroup2" else "memory" in controllers.split(","):
            yield path


def _lines(name: str) -> list[str]:
    try:
        return (_PROC / name).read_text(errors="replace").splitlines()
    except OSError:
        return []

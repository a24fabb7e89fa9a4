"""Who may look into the segments: this user's processes, and no others."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import traceback

import pytest
import torch
import torch.distributed as dist

from fastddp import extension
from tests.ranks import init_group, run_ranks

pytestmark = [
    pytest.mark.usefixtures("needs_shm"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]

NOBODY = 65534


def as_nobody(path: str) -> int:
    """Returns the error number with which another user's process fails to open `path`."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.open(path, os.O_RDONLY)
        except OSError as error:
            os._exit(error.errno or 255)
        except BaseException:
            traceback.print_exc()
            os._exit(254)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _show(rank: int, world_size: int) -> None:
    init_group("shm", 20)
    dist.all_reduce(torch.ones(100_000))
    native = extension.load()
    control = native.shm_control(2)
    for address in (native.shm_heap(), control.address()):
        pid, fd, num_bytes, *_ = address.parts()
        assert pid == os.getpid()
        path = f"/proc/{pid}/fd/{fd}"
        status = os.stat(path)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert status.st_uid == os.geteuid()
        assert status.st_nlink == 0
        assert status.st_size == num_bytes
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_SHRINK
        assert seals & fcntl.F_SEAL_GROW
        assert not os.get_inheritable(fd)
        os.close(os.open(path, os.O_RDWR))  # this user can
        if os.geteuid() == 0:
            assert as_nobody(path) == errno.EACCES
    dist.barrier()


def test_segments_are_private_anonymous_and_of_fixed_size() -> None:
    run_ranks(_show, 2, init_group=False)


def _announce_wrong_nonce(rank: int, world_size: int) -> None:
    native = extension.load()
    pid, fd, num_bytes, high, low = native.shm_heap().parts()
    group = dist.group.WORLD._get_backend(torch.device("cpu"))
    good = native.shm_control(1)

    def connect(heap, control) -> None:
        native.ShmBackend(0, 1, group, [0], [heap], control, 5.0, "a group")

    connect(native.shm_heap(), good.address())
    for wrong in (
        (pid, fd, num_bytes, high, low ^ 1),
        (pid, fd, num_bytes * 2, high, low),
        (pid, 1, num_bytes, high, low),
    ):
        with pytest.raises(RuntimeError, match=r"is not the segment that was announced|/proc/"):
            connect(native.ShmAddress(*wrong), good.address())
    with pytest.raises(RuntimeError, match=r"/proc/|pidfd_open"):
        connect(native.ShmAddress(2**22 + 1, fd, num_bytes, high, low), good.address())


def test_what_was_not_announced_is_not_opened() -> None:
    run_ranks(_announce_wrong_nonce, 1)

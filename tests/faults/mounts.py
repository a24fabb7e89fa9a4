"""Mounts that only the calling thread of this process, and what it starts, sees."""

from __future__ import annotations

import ctypes
import os

_CLONE_NEWNS = 0x00020000
_MS_RDONLY = 1
_MS_REC_PRIVATE = 0x4000 | 1 << 18


class NotPermitted(Exception):
    """This process may not mount anything."""


def hide(folder: str, size: str = "64k", read_only: bool = False) -> None:
    """Puts an empty tmpfs of that size over a folder.

    Raises:
        NotPermitted: if this takes privileges that the process lacks.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            raise NotPermitted(os.strerror(ctypes.get_errno()))

    check(libc.unshare(_CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None))
    flags = ctypes.c_ulong(_MS_RDONLY if read_only else 0)
    check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, f"size={size}".encode()))

"""Waits for the other ranks of a group, by name: an error says where it was, and who was missing.

The watcher (``fastddp/watch/watcher.py``) looks at what lasts. A wait that is over sooner costs
microseconds and touches no store.
"""

from __future__ import annotations

from types import TracebackType

import torch.distributed as dist
from torch.distributed import ProcessGroup

from fastddp.comm.groups import name_of, watch
from fastddp.watch import watcher


class waiting:
    """Names a wait, in a ``with`` block around nothing but a collective.

    Args:
        group: the ranks that are waited for.
        call: what the script has called, and what goes on in that call.

    Raises:
        torch.distributed.DistBackendError: for a RuntimeError of the collective, such as the
            group's timeout; names this rank, the call and the ranks that were not in it.
    """

    def __init__(self, group: ProcessGroup, call: str) -> None:
        self._call = call
        self._rank = group.rank()
        watch(group)
        # Not the group: the thread that frees it last joins its threads, and might be the watcher.
        self._group_name = name_of(group)

    def __enter__(self) -> None:
        self._wait = watcher.begin(self._call, self._group_name)

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        failed = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
        watcher.end(self._wait, failed)
        if failed:
            absent = f" ({self._wait.absent})" if self._wait.absent else ""
            raise dist.DistBackendError(
                f"fastddp: rank {self._rank}: {self._call} failed{absent}: {error}"
            ) from error

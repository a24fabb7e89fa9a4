"""A process group that is referred to, and not kept alive."""

from __future__ import annotations

import weakref

from torch.distributed import ProcessGroup


class WeakGroup:
    """Returns a process group when called, for as long as the script keeps it.

    The reference is weak: the code that frees a process group last joins the group's threads, and
    must not hold the GIL then. Held by a reducer, a group could be freed by the garbage collector,
    and the process would hang.

    Args:
        group: the process group, which the script may destroy at any time.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self._rank = group.rank()

    def __call__(self) -> ProcessGroup:
        """Returns the group.

        Raises:
            RuntimeError: if the script has destroyed it.
        """
        group = self._group()
        if group is None:
            raise RuntimeError(
                f"fastddp: rank {self._rank}: the process group of this model was destroyed before"
                " its backward; call destroy_process_group() after the last step"
            )
        return group

"""The order in which the models on one group launch their collectives.

Rounds begin in the same order on every rank, with the outputs of the models' forwards; buckets fill
in an order that depends on which parameters a rank uses. So the buckets of a round wait until every
round that began before it, on the same group, has launched all of its own. A rank that misses no
gradient waits for nothing. ``csrc/core/launch_order.h`` is the same in C++.
"""

from __future__ import annotations

import threading
import weakref

from torch.distributed import ProcessGroup


class LaunchOrder:
    """The rounds of one group that have collectives to launch, in the order in which they began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[int] = []
        self._titles: dict[int, str] = {}

    def introduce(self, owner: int, title: str) -> None:
        """Takes note of a model on the group."""
        with self._lock:
            self._titles[owner] = title

    def others(self, owner: int) -> str:
        """Returns what the other models on the group are called."""
        with self._lock:
            return ", ".join(title for other, title in self._titles.items() if other != owner)

    def begin(self, reducer: int) -> None:
        """Takes note of a round that begins; ``reducer`` has one at a time."""
        with self._lock:
            self._open.append(reducer)

    def may_launch(self, reducer: int) -> bool:
        """Returns whether all rounds that began before this one have launched what they have."""
        with self._lock:
            return not self._open or self._open[0] == reducer

    def end(self, reducer: int) -> None:
        """Takes note that a round has launched all that it has; once more does nothing."""
        with self._lock:
            if reducer in self._open:
                self._open.remove(reducer)


_orders: weakref.WeakKeyDictionary[ProcessGroup, LaunchOrder] = weakref.WeakKeyDictionary()


def order_of(group: ProcessGroup) -> LaunchOrder:
    """Returns the group's one."""
    return _orders.setdefault(group, LaunchOrder())

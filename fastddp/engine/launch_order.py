"""The order in which the models on one group launch their collectives.

Rounds begin in the same order on every rank, that of the outputs of the models' forwards. Buckets
fill in an order that depends on which parameters a rank uses. So the buckets of a round wait until
every round that began before it, on the same group, has launched all of its buckets. A rank that
has all gradients waits for nothing. ``csrc/core/launch_order.h`` is the same in C++.
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
        """Takes note of the title of a model on the group."""
        with self._lock:
            self._titles[owner] = title

    def others(self, owner: int) -> str:
        """Returns the titles of the other models on the group, with commas between them."""
        with self._lock:
            return ", ".join(title for other, title in self._titles.items() if other != owner)

    def begin(self, reducer: int) -> None:
        """Takes note that a round of a reducer begins; a reducer has one round at a time."""
        with self._lock:
            self._open.append(reducer)

    def may_launch(self, reducer: int) -> bool:
        """Returns whether all rounds that began before this one have launched everything."""
        with self._lock:
            return not self._open or self._open[0] == reducer

    def end(self, reducer: int) -> None:
        """Takes note that a round has launched everything; a second call does nothing."""
        with self._lock:
            if reducer in self._open:
                self._open.remove(reducer)


class Turn:
    """The place that one reducer has in the order, in each of its rounds.

    Args:
        order: the order of the reducer's group.
        key: a number that no other reducer has while this one lives.
    """

    def __init__(self, order: LaunchOrder, key: int) -> None:
        self._order = order
        self._key = key

    def begin(self) -> None:
        """Takes note that a round of the reducer begins."""
        self._order.begin(self._key)

    def has_come(self) -> bool:
        """Returns whether the round may launch."""
        return self._order.may_launch(self._key)

    def end(self) -> None:
        """Takes note that the round has launched everything; a second call does nothing."""
        self._order.end(self._key)


_orders: weakref.WeakKeyDictionary[ProcessGroup, LaunchOrder] = weakref.WeakKeyDictionary()


def order_of(group: ProcessGroup) -> LaunchOrder:
    """Returns the order of a group, of which there is one."""
    return _orders.setdefault(group, LaunchOrder())

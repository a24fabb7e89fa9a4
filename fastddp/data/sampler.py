"""Which samples of a dataset a rank sees: torch's sampler, and one that shares without padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sized
from typing import Any, Literal, cast

import torch.distributed as dist
import torch.utils.data
from torch.utils.data import Dataset

from fastddp.comm.launch import describe_environment

Pad = Literal["wrap", "none", "drop"]


class DistributedSampler(torch.utils.data.DistributedSampler[int]):
    """Gives every rank its share of a dataset: of the (shuffled) order, each world-th sample.

    Like torch's class of this name, with the same order for the same seed and epoch, and with
    ``pad``. It also works where there is no process group: in a launcher's process before the group
    is made, and in a plain process, which gets the whole dataset.

    Args:
        dataset: anything with a length.
        num_replicas: how many ranks share it; by default as many as the group, or a launcher's
            environment, has.
        rank: whose share this is; by default this process's.
        shuffle: whether :meth:`set_epoch` chooses a random order, else it is the dataset's.
        seed: of that order; the same on all ranks.
        drop_last: torch's name for ``pad="drop"``.
        pad: what to do with a dataset that cannot be shared equally.

            * ``"wrap"``, the default: repeat samples from the order's start, as torch does. For
              training, where every rank needs the same number of batches.
            * ``"drop"``: leave out the order's tail.
            * ``"none"``: neither; the first ranks get one sample more than the last ones. For exact
              evaluation, with :func:`fastddp.gather_unpadded`. Ranks may have different numbers of
              batches, or none, so call ``model.module`` in the loop: a wrapped forward may
              communicate, and would then wait for a rank that is through.

    Warns:
        UserWarning: on rank 0, if a second pass begins and :meth:`set_epoch` was never called, so
            that it has the first one's order; and if ``"drop"`` leaves no sample at all.

    Raises:
        ValueError: if ``pad`` is unknown or contradicts ``drop_last``, or ``rank`` and
            ``num_replicas`` do not go together.
        RuntimeError: if the environment describes half a process group.

    Example::

        sampler = fastddp.DistributedSampler(train)
        loader = DataLoader(train, batch_size=32, sampler=sampler)
        for epoch in range(10):
            sampler.set_epoch(epoch)
            for inputs, targets in loader: ...
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        pad: Pad | None = None,
    ) -> None:
        if pad is None:
            pad = "drop" if drop_last else "wrap"
        if pad not in ("wrap", "none", "drop"):
            raise ValueError(
                f"fastddp.DistributedSampler: pad={pad!r} is none of 'wrap', 'none', 'drop'"
            )
        if drop_last and pad != "drop":
            raise ValueError(
                f"fastddp.DistributedSampler: drop_last=True contradicts pad={pad!r}; drop_last"
                " means pad='drop', so leave one of them out"
            )
        num_replicas, rank = _find_place(num_replicas, rank)
        super().__init__(
            cast("Dataset[Any]", dataset), num_replicas, rank, shuffle, seed, pad == "drop"
        )
        self.pad: Pad = pad
        length = len(cast(Sized, dataset))
        if pad == "none":
            # torch's __iter__ pads up to total_size, and checks what it yields against num_samples.
            self.total_size = length
            self.num_samples = len(range(rank, length, num_replicas))
        self._epoch_was_set = False
        self._passes = 0
        if pad == "drop" and 0 < length < num_replicas:
            self._warn(f"pad='drop' leaves no sample of a dataset of {length}")

    def __iter__(self) -> Iterator[int]:
        self._passes += 1
        forgotten = not self._epoch_was_set and self.epoch == 0  # some set the attribute
        if self.shuffle and self._passes == 2 and forgotten:
            self._warn(
                "a second pass begins in the order of the first one; call"
                " sampler.set_epoch(epoch) before each epoch for another order"
            )
        return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the passes that begin from now on. Call it alike on all ranks."""
        self._epoch_was_set = True
        super().set_epoch(epoch)

    def _warn(self, what: str) -> None:
        if self.rank == 0:
            warnings.warn(
                f"fastddp.DistributedSampler, {self.num_replicas} rank(s): {what}", stacklevel=3
            )


def _find_place(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Returns the number of ranks and this one, as far as they were not given."""
    # Whoever gives both need not be in an environment that makes sense.
    known = _known_place() if num_replicas is None or rank is None else None
    if num_replicas is None:
        num_replicas = known[0] if known else 1
    if num_replicas < 1:
        raise ValueError(f"fastddp.DistributedSampler: num_replicas={num_replicas}, less than 1")
    if rank is None:
        if known is None and num_replicas > 1:
            raise ValueError(
                f"fastddp.DistributedSampler: which of num_replicas={num_replicas} ranks is this?"
                " There is neither a process group nor a launcher's environment; pass rank too"
            )
        rank = known[1] if known else 0
    if not 0 <= rank < num_replicas:
        raise ValueError(
            f"fastddp.DistributedSampler: rank={rank} is not in 0 ... num_replicas-1 ="
            f" {num_replicas - 1}; pass both or neither"
        )
    return num_replicas, rank


def _known_place() -> tuple[int, int] | None:
    """Returns world size and rank of the group or else the launcher's; None if there is neither."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    environment = describe_environment()
    if environment.world_size is None or environment.rank is None:
        return None
    return environment.world_size, environment.rank

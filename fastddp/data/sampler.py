"""Chooses the samples that a rank sees: torch's sampler, and ways to share without padding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sized
from typing import Any, Literal, cast

import torch.distributed as dist
import torch.utils.data
from torch.utils.data import Dataset

from fastddp.comm.environment import describe_environment

Pad = Literal["wrap", "none", "drop"]


class DistributedSampler(torch.utils.data.DistributedSampler[int]):
    """Gives every rank its share of a dataset, as indices.

    The dataset's indices are shuffled if asked for. Of ``num_replicas`` ranks, rank r gets those at
    positions r, r + ``num_replicas``, r + 2 ``num_replicas`` and so on.

    It is a subclass of :class:`torch.utils.data.DistributedSampler` and gives the same order for
    the same seed and epoch. It adds ``pad``, and works without a process group too: in a launched
    process before the group is made, and in a plain process, which gets the whole dataset.

    Nothing of it is collective. One sampler is meant for one thread at a time.

    Args:
        dataset: the dataset, or any object that has a length.
        num_replicas: the number of ranks that share the dataset; by default the size of the default
            group, or else of the launcher's world.
        rank: the rank that gets this share; by default this process's rank.
        shuffle: whether the order is random, another one for each epoch that :meth:`set_epoch`
            names; else it is the dataset's order.
        seed: the seed of the random order; it has to be the same on all ranks.
        drop_last: torch's name for ``pad="drop"``.
        pad: the way to share a dataset of a length that ``num_replicas`` does not divide.

            * ``"wrap"``, the default: repeat samples from the start of the order, as torch does.
              For training, where every rank needs the same number of batches.
            * ``"drop"``: leave out the last samples of the order.
            * ``"none"``: do neither; the first ranks get one sample more than the last ones. For
              exact evaluation, with :func:`fastddp.gather_unpadded`. Ranks may have different
              numbers of batches, or none, so call ``model.module`` in the loop: a forward of the
              wrapper may communicate, and would then wait for a rank that has finished.

    Warns:
        UserWarning: on rank 0, if a second pass begins before :meth:`set_epoch` was ever called, so
            that it repeats the order of the first pass; and if ``"drop"`` leaves no sample at all.

    Raises:
        ValueError: if ``pad`` is unknown or contradicts ``drop_last``, or if ``rank`` and
            ``num_replicas`` do not fit together.
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
                f"fastddp.DistributedSampler: pad={pad!r} is not one of 'wrap', 'none', 'drop'"
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
            # torch's __iter__ pads to total_size, and checks that it yields num_samples indices.
            self.total_size = length
            self.num_samples = len(range(rank, length, num_replicas))
        self._epoch_was_set = False
        self._passes = 0
        if pad == "drop" and 0 < length < num_replicas:
            self._warn(f"pad='drop' leaves no sample of a dataset of {length}")

    def __iter__(self) -> Iterator[int]:
        self._passes += 1
        forgotten = not self._epoch_was_set and self.epoch == 0  # scripts may assign `epoch` too
        if self.shuffle and self._passes == 2 and forgotten:
            self._warn(
                "a second pass begins in the order of the first one; call"
                " sampler.set_epoch(epoch) before each epoch for another order"
            )
        return super().__iter__()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the passes that begin from now on.

        Args:
            epoch: the number of the epoch, from 0; it has to be the same on all ranks.
        """
        self._epoch_was_set = True
        super().set_epoch(epoch)

    def _warn(self, what: str) -> None:
        if self.rank == 0:
            warnings.warn(
                f"fastddp.DistributedSampler, {self.num_replicas} rank(s): {what}", stacklevel=3
            )


def _find_place(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Returns the number of ranks and this process's rank, from the arguments where given.

    Raises:
        ValueError: if there is no way to find out, or the two do not fit together.
        RuntimeError: if the environment describes half a process group.
    """
    # With both given, the environment is not looked at: it need not make sense.
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
    """Returns the world size and the rank, by the default group or else by the launcher.

    None if there is neither a group nor a launcher.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    environment = describe_environment()
    if environment.world_size is None or environment.rank is None:
        return None
    return environment.world_size, environment.rank

"""What scripts and tools call on the reducer of torch's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

from fastddp.ddp.arrivals import Arrivals
from fastddp.ddp.replica import Replica


class TorchReducer:
    """The methods of torch's reducer. Where one does nothing, there is nothing to do.

    Args:
        replica: this rank's copy of the wrapped model.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def prepare_for_forward(self) -> None:
        """Nothing to prepare: what precedes a forward is the wrapper's part."""

    def prepare_for_backward(self, outputs: Sequence[torch.Tensor]) -> None:
        """Nothing to prepare: whether to average is decided when backward begins."""

    def _get_local_used_map(self) -> torch.Tensor:
        """Returns, by parameter, how many ranks had a gradient for it in the latest backward.

        The tensor has one int32 element per parameter and lies on the model's device.
        """
        replica = self._replica
        used = dict(zip(replica.hooked, replica.used_by(), strict=True))
        counts = [used[p] for p in replica.module.parameters() if p in used and p.requires_grad]
        return torch.tensor(counts, dtype=torch.int32, device=replica.device)

    def get_backward_stats(self) -> list[int]:
        """Returns, by parameter, how many nanoseconds into the latest backward its gradient came.

        Measured from the first call on, which returns zeros.
        """
        replica = self._replica
        hooked = [p for p in replica.module.parameters() if p in replica.hooked and p.requires_grad]
        if replica.arrivals is None or not replica.arrivals.are_of(hooked):
            replica.arrivals = Arrivals(hooked)
        return replica.arrivals.since(replica.stats().began_ns)

    def _ddp_graph_static(self) -> bool:
        """Returns whether this rank has used the same parameters in every backward."""
        return self._replica.stats().is_static

    def _rebuild_buckets(self) -> bool:
        """Returns whether buckets were planned anew by this call, which is never."""
        return False

    def _push_all_rebuilt_params(self) -> None:
        """Nothing to push: buckets are planned from what has arrived."""

    def _delay_all_reduce(self) -> None:
        """Nothing to do: the delay of all-reduces is an option of the wrapper."""

    def _set_static_graph(self) -> None:
        """Nothing to set but what is read back, see :mod:`fastddp.ddp.options`."""
        self._replica.options.unused["static_graph"] = True

    def _set_sparse_metadata(self, global_unique_ids: Mapping[str, torch.Tensor]) -> None:
        """Nothing to set: which rows the ranks' gradients have is found out in each round."""

    def set_logger(self, logger: object) -> None:
        """Nothing to set: what is logged is asked for, not told."""

    def _check_reducer_finalized(self) -> None:
        """Nothing to check: a backward that raised leaves no round open."""

    def _install_post_backward_futures(self, futures: Sequence[torch.futures.Future[Any]]) -> None:
        """Has the futures waited for at the end of the next synchronised backward."""
        self._replica.wait_after_backward(futures)

    def _remove_autograd_hooks(self) -> None:
        """Leaves gradients this rank's own from now on."""
        self._replica.detach()

    def _update_process_group(self, new_process_group: ProcessGroup) -> None:
        """Averages over the ranks of another group from now on."""
        self._replica.move_to(new_process_group)

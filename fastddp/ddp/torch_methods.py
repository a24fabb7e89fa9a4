"""Methods of torch's class that scripts and tools call, and that have little or nothing to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastddp.ddp.logging_data import Samples, logging_data
from fastddp.ddp.replica import Replica
from fastddp.ddp.torch_logger import TorchLogger
from fastddp.ddp.torch_reducer import TorchReducer


class TorchMethods:
    """The part of the wrapper that is there because torch's class has it."""

    _replica: Replica
    _samples: Samples
    """Times of some iterations, for the logging data."""
    _logged: dict[str, Any]
    """What the wrapper itself adds to the logging data."""

    def _set_static_graph(self) -> None:
        """Nothing to set but what is read back: see :mod:`fastddp.ddp.options`."""
        TorchReducer(self._replica)._set_static_graph()

    def _set_ddp_runtime_logging_sample_rate(self, sample_rate: int) -> None:
        """Sets how many iterations lie between two whose times are in the logging data.

        Args:
            sample_rate: the number of iterations, at least 1.

        Raises:
            ValueError: if the rate is less than 1.
        """
        if sample_rate < 1:
            with self._errors_logged():
                raise ValueError(
                    "fastddp: the sample rate of the logging data must be equal or greater than 1,"
                    f" got {sample_rate}"
                )
        self._samples.rate = sample_rate

    def _check_reducer_finalized(self) -> None:
        """Nothing to check: a backward that raised leaves no round open."""

    def _set_sparse_metadata(self, global_unique_ids: Mapping[str, torch.Tensor]) -> None:
        """Nothing to set: which rows the ranks' gradients have is found out in each round."""

    def _clear_grad_buffer(self) -> None:
        """Nothing to clear: delayed gradients are packed when they are sent."""

    def _lazy_init(self) -> None:
        """Does what the first forward does: optimizers that step in backward are taken over."""
        self._replica.begin()

    def _get_ddp_logging_data(self) -> dict[str, Any]:
        """Returns what torch's logger would know, under torch's names."""
        replica = self._replica
        data = logging_data(
            replica.module,
            replica.group,
            replica.options,
            replica.plan(),
            replica.stats(),
            replica.error,
        )
        return data | self._samples.entries(on_host=replica.device.type == "cpu") | self._logged

    @contextlib.contextmanager
    def _errors_logged(self) -> Iterator[None]:
        """Has the logging data tell of an error that leaves the block."""
        try:
            yield
        except Exception as error:
            TorchLogger(self).set_error_and_log(f"{type(error)}: {error}")
            raise

    def _remove_autograd_hooks(self) -> None:
        """Unhooks the parameters, for good: their gradients are this rank's own from now on."""
        self._replica.detach()

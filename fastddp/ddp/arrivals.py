"""When gradients arrive in a backward, by parameter: measured for whoever asks, from then on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch import nn
from torch.autograd.graph import get_gradient_edge

from fastddp.device.compiler import untraced


class Arrivals:
    """Hooks parameters for as long as it lives.

    Args:
        params: each requires grad.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self._arrived_ns = dict.fromkeys(params, 0)
        self._handles = [
            get_gradient_edge(param).node.register_hook(_hook(self._arrived_ns, param))
            for param in self._arrived_ns
        ]

    def __del__(self) -> None:
        for handle in self._handles:
            handle.remove()

    def are_of(self, params: Iterable[nn.Parameter]) -> bool:
        """Returns whether it is these that are hooked."""
        return list(map(id, self._arrived_ns)) == list(map(id, params))

    def since(self, began_ns: int) -> list[int]:
        """Returns, in nanoseconds, how long after the beginning of a backward each arrived.

        0 for those that have not.

        Args:
            began_ns: of the latest backward, since the epoch.
        """
        return [max(0, arrived - began_ns) for arrived in self._arrived_ns.values()]


def _hook(arrived_ns: dict[nn.Parameter, int], param: nn.Parameter) -> Callable[..., None]:
    @untraced
    def hook(*_: object) -> None:
        arrived_ns[param] = time.time_ns()

    return hook

"""The graph node that hands parameters to the replicas and adds up the replicas' gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from fastddp.data_parallel.packing import Layout, Packing, has_plain_memory


class Fan(torch.autograd.Function):
    """Takes parameters and returns, for each replica, one stand-in per parameter.

    In backward it adds up the replicas' gradients in replica order. The order of arrival depends on
    the threads, and the bits of a sum depend on its order, so a sum in order of arrival would
    differ from run to run.
    """

    @staticmethod
    def forward(ctx: Any, rows: Sequence[Sequence[Tensor]], *params: Tensor) -> tuple[Tensor, ...]:
        """Makes the stand-ins.

        Args:
            ctx: autograd's context of this node.
            rows: for each replica, the tensors that its stand-ins share memory with: the parameters
                themselves or copies of them.
            params: the parameters of this node. If there are several, they have one dtype and one
                device, and all of them require a gradient.

        Returns:
            The stand-ins of the first replica, then those of the second, and so on.
        """
        # A replica that did not use a parameter adds None. A zero would make a sparse sum dense.
        ctx.set_materialize_grads(False)
        ctx.device = params[0].device
        ctx.layouts = [Layout.of(param) for param in params] if len(params) > 1 else [None]
        # Detached tensors and not views: a view loses its place in the graph when its base is
        # written to, which the optimizer does. A detached tensor shares the version counter, so
        # autograd still notices the write.
        return tuple(tensor.detach() for row in rows for tensor in row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.layouts)
        # The parameters that can be added up in one pass, by the replicas that used them.
        groups: dict[tuple[int, ...], list[int]] = {}
        totals: list[Tensor | None] = []
        for index in range(count):
            own = grads[index::count]
            users = tuple([nth for nth, grad in enumerate(own) if grad is not None])
            if count > 1 and users not in ((), (0,)) and _can_pack([own[nth] for nth in users]):
                groups.setdefault(users, []).append(index)
                totals.append(None)
            else:
                totals.append(_sum(own, ctx.device))
        for users, indices in groups.items():
            layouts = [ctx.layouts[index] for index in indices]
            rows = [[grads[nth * count + index] for index in indices] for nth in users]
            for index, total in zip(indices, _packed_sums(layouts, rows, ctx.device), strict=True):
                totals[index] = total
        return None, *totals


def _can_pack(grads: Sequence[Tensor | None]) -> bool:
    """Returns whether all gradients are plain memory that autograd does not watch."""
    return not torch.is_grad_enabled() and all(
        grad is not None and has_plain_memory(grad) and not _is_batched(grad) for grad in grads
    )


def _is_batched(grad: Tensor) -> bool:
    """Returns whether it stands for a batch of gradients, as with ``is_grads_batched=True``."""
    return is_functorch_wrapped_tensor(grad) or is_legacy_batchedtensor(grad)


def _sum(grads: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """Adds up one parameter's gradients on a device, in replica order.

    Args:
        grads: the gradient of each replica; None for one that did not use the parameter.
        device: the device of the parameter.

    Returns:
        The sum; None if there is no gradient.
    """
    total = None
    for grad in grads:
        if grad is not None:
            with _behind(device, [grad]):
                moved = grad.to(device, non_blocking=True)
            total = moved if total is None else total + moved
    return total


def _packed_sums(
    layouts: Sequence[Layout], rows: Sequence[Sequence[Any]], device: torch.device
) -> list[Tensor]:
    """Adds up the gradients of several parameters, with one transfer per replica.

    The bits are the same as if each parameter's gradients were added up by themselves.

    Args:
        layouts: the memory layout of each parameter.
        rows: for each replica, its gradients of all these parameters, on the replica's device.
        device: the device of the parameters.

    Returns:
        The sum for each parameter, in the parameter's layout.
    """
    packing = Packing.of(layouts, rows[0][0].dtype)
    total = None
    for grads in rows:
        with _behind(device, grads):
            flat = packing.pack(grads)
        moved = flat.to(device, non_blocking=True)
        total = moved if total is None else total.add_(moved)
    assert total is not None
    return packing.unpack(total)


@contextmanager
def _behind(device: torch.device, grads: Sequence[Tensor]) -> Iterator[None]:
    """Makes the gradients' device the current one, on a stream where the gradients are ready.

    Autograd orders only the stream that the fan runs on, on the parameters' device, behind the
    gradients. Without this, a stream of another device could read them before they are written.

    Args:
        device: the device of the parameters.
        grads: the gradients that the body of the block reads, all on one device.
    """
    there = grads[0].device
    if there == device:
        yield
        return
    with torch.accelerator.device_index(there.index):
        stream = torch.accelerator.current_stream(there)
        stream.wait_stream(torch.accelerator.current_stream(device))
        yield
        for grad in grads:  # a gradient may belong to another stream, which must not reuse it yet
            if not _is_batched(grad):
                for memory in (grad._indices(), grad._values()) if grad.is_sparse else (grad,):
                    memory.record_stream(stream)

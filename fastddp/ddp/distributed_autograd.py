"""Distributed autograd, torch's backward over RPC: gradients are averaged in their context.

Such a backward collects gradients in a context (``torch.distributed.autograd.context()``) in place
of ``.grad``, but runs the hooks of the nodes that would have written to ``.grad``, which are what a
reducer hangs on. So for as long as it runs, the context's gradients are lent to ``.grad``: a hook
before each node puts there what the context will hold, the reducer averages it as ever, and in the
end the mean goes to the context and ``.grad`` is what it was.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from fastddp.ddp.replica import Replica
from fastddp.device.backward import at_end_of_backward, on_backward, wait_until
from fastddp.device.compiler import untraced
from fastddp.device.nested import tensors_in
from fastddp.device.streams import has_streams


@untraced
def watch(replica: Replica, output: object) -> None:
    """Takes note of what a forward has returned, if it ran in a context and in grad mode.

    Args:
        replica: the copy of the model that ran.
        output: the value that forward returned; a distributed backward through it is averaged.

    Raises:
        NotImplementedError: if the model has delayed all-reduces, which go by ``.grad``, or is to
            be finalized by hand: the gradients are only lent to ``.grad``.
    """
    context = _current_context()
    if context is None or replica.alone:
        return
    if replica.model.delayed:
        raise NotImplementedError(
            "fastddp: a forward inside torch.distributed.autograd.context() of a model with"
            " delay_all_reduce_named_params; leave out the delay, or use an ordinary backward"
            " outside the context"
        )
    _refuse_manual(replica)
    this = weakref.ref(replica)

    def begin() -> None:
        alive = this()
        if alive is not None and not alive.is_lent and _is_distributed():
            _refuse_manual(alive)
            _Backward(alive, context).begin()

    on_backward(tensors_in(output), begin)


def _refuse_manual(replica: Replica) -> None:
    if replica.manual:
        raise NotImplementedError(
            "fastddp: torch.distributed.autograd.context() and"
            " require_manual_backward_finalization = True; set it to False for backwards over RPC"
        )


def settle(replica: Replica) -> None:
    """Waits for the end of a backward that raised, of which torch may let go in another thread.

    Args:
        replica: the copy of the model that the backward went through.

    Raises:
        RuntimeError: if it has not ended within the group's timeout: ``.grad`` is lent to it.
    """
    if not replica.is_lent:
        return
    timeout_s = replica.ranks.timeout_s(replica.device)
    if not wait_until(lambda: not replica.is_lent, timeout_s):
        raise RuntimeError(
            f"fastddp: rank {replica.live_group.rank()}: a distributed backward through this model"
            f" has not ended in another thread within {timeout_s:g} s, the process group's timeout;"
            " let it end before the next forward"
        )


def _current_context() -> int | None:
    """Returns the number of the active context, if gradients are recorded in one."""
    rpc = sys.modules.get("torch.distributed.rpc")
    has_agent = getattr(rpc, "_is_current_rpc_agent_set", None)  # absent in a torch without RPC
    if has_agent is None or not has_agent() or not torch.is_grad_enabled():
        return None
    try:
        return int(_api()._current_context()._context_id())
    except RuntimeError:  # there is none
        return None


def _api() -> Any:
    return sys.modules["torch.distributed.autograd"]  # which the one for RPC imports


def _is_distributed() -> bool:
    """Returns whether the hook that calls this is run by a distributed backward.

    That has an engine of its own, which runs nodes without making one of them the current one.
    """
    return torch._C._current_autograd_node() is None


def _node(param: nn.Parameter) -> Node:
    return get_gradient_edge(param).node


class _Backward:
    """One distributed backward, or the part of it that runs on this rank.

    Args:
        replica: the copy of the model that the backward goes through.
        context: the number of the context that collects the gradients.
    """

    def __init__(self, replica: Replica, context: int) -> None:
        self._replica = replica
        self._context = context
        self._own: dict[nn.Parameter, Tensor | None] = {}
        """By parameter, ``.grad`` as it is to be afterwards."""
        self._lent: dict[nn.Parameter, Tensor | None] = {}
        """What was put there in its place."""
        self._hooks: list[RemovableHandle] = []
        self._is_touched = False  # a node has run that has a gradient for a parameter

    @torch.no_grad()
    def begin(self) -> None:
        self._replica.is_lent = True
        at_end_of_backward(self._end_untouched)
        before = _api().get_gradients(self._context)
        for param in self._replica.hooked:
            self._own[param] = param.grad  # held, so that the reducer writes elsewhere
            self._lend(param, before.get(param))
            if param.requires_grad:
                node = _node(param)
                self._hooks.append(node.register_prehook(self._before_node(param)))
                self._hooks.append(node.register_hook(self._after_node))

    def _lend(self, param: nn.Parameter, grad: Tensor | None) -> None:
        """Puts a copy there: what the reducer is given is its own."""
        if grad is not None:
            grad = grad.clone() if grad.is_sparse else torch.empty_like(param).copy_(grad)
        param.grad = self._lent[param] = grad

    def _before_node(self, param: nn.Parameter) -> Callable[..., None]:
        @untraced
        @torch.no_grad()
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            (grad,) = gradients
            if grad is not None:
                before = self._lent[param]
                self._lend(param, grad if before is None else before + grad)

        return hook

    @untraced
    def _after_node(self, _: object, gradients: tuple[Tensor | None, ...]) -> None:
        """Asks for the end of this backward, once the reducer has, whose round has to end first."""
        if not self._is_touched and gradients[0] is not None:
            self._is_touched = True
            at_end_of_backward(self._end)

    def _end_untouched(self, ok: bool) -> None:
        if not self._is_touched:
            self._end(ok)

    @untraced
    @torch.no_grad()
    def _end(self, ok: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        try:
            if ok:
                self._hand_over()
        finally:
            for param, own in self._own.items():
                param.grad = own
            self._replica.is_lent = False

    def _hand_over(self) -> None:
        """Gives the context what the reducer has made of its gradients."""
        collected = _api().get_gradients(self._context)
        for param, lent in self._lent.items():
            mean = param.grad
            if mean is not None and mean is not lent:
                self._replace(param, collected.get(param), mean)

    def _replace(self, param: nn.Parameter, collected: Tensor | None, mean: Tensor) -> None:
        if collected is None:
            raise RuntimeError(
                f"fastddp: rank {self._replica.live_group.rank()}: a distributed backward gave this"
                f" rank no gradient for parameter '{self._name_of(param)}', but gave one to other"
                " ranks; its context cannot hold the mean. Use every parameter on each rank, or"
                " add 0 * parameter.sum() to the loss"
            )
        if collected.is_sparse and not mean.is_sparse:
            mean = mean.to_sparse(collected.sparse_dim())
        collected.copy_(mean)
        if has_streams(param.device):  # the context knows of no writer but its own
            torch.accelerator.current_stream(param.device).synchronize()

    def _name_of(self, param: nn.Parameter) -> str:
        named = self._replica.module.named_parameters()
        return next(name for name, candidate in named if candidate is param)

"""A forward and backward in low precision, for parameters and an optimizer in full precision.

While the model runs, each module has casts of its parameters in their place. A cast is part of the
graph, so gradients come back to the parameters themselves, in their own dtype, and neither the
reducer nor the optimizer sees a difference. Backward has the casts too, because activation
checkpoints run parts of the model in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.utils import _cast_forward_inputs

from fastddp.ddp.model import ignored_names
from fastddp.device.backward import at_end_of_backward, on_backward
from fastddp.device.compiler import untraced, untraced_itself
from fastddp.device.nested import tensors_in


class LowPrecision:
    """Runs a module in another dtype than its parameters have.

    Args:
        module: the module to run. Floating-point parameters of it are cast, but for those that it
            asks data parallelism to ignore.
        dtype: the dtype to which parameters and floating-point inputs are cast.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module = module
        self._dtype = dtype
        self._in_backward = False
        for param in self._cast_ones():
            # For those who ask a parameter what torch's class puts there; the casts themselves
            # live as long as a forward and its backward, and are not attributes.
            param._fp_param = param.detach()  # type: ignore[attr-defined]
            param._mp_param = torch.empty_like(param, dtype=dtype, device="meta")  # type: ignore[attr-defined]

    def _cast_ones(self) -> dict[nn.Parameter, None]:
        ignored = ignored_names(self._module)
        params = self._module.named_parameters()
        return dict.fromkeys(
            p for name, p in params if name not in ignored and p.is_floating_point()
        )

    @untraced_itself
    def run(
        self, forward: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """Returns what ``forward`` returns for these inputs, cast.

        The modules have their parameters back afterwards, also if ``forward`` raises.

        Args:
            forward: a function that calls the module.
            inputs: the positional arguments of ``forward``, of any types.
            kwargs: the keyword arguments of ``forward``.
        """
        inputs, kwargs = self._cast_inputs(inputs, kwargs)
        casts = self._cast_parameters()
        put_back = _put_in_place(casts)
        try:
            output = forward(*inputs, **kwargs)
        finally:
            put_back()
        self._watch(output, casts)
        return output

    @untraced
    def _cast_inputs(self, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        cast: tuple[Any, Any] = _cast_forward_inputs(self._dtype, *inputs, **kwargs)
        return cast

    @untraced
    def _cast_parameters(self) -> list[_Cast]:
        ignored = ignored_names(self._module)
        left_alone = {p for name, p in self._module.named_parameters() if name in ignored}
        low: dict[Tensor, Tensor] = {}  # tied parameters stay tied
        casts = []
        for module in self._module.modules():
            for name, param in module._parameters.items():
                if param is None or param in left_alone or not param.is_floating_point():
                    continue
                if param not in low:
                    low[param] = _cast(module, param, self._dtype)
                casts.append(_Cast(module, name, low[param]))
        return casts

    @untraced
    def _watch(self, output: object, casts: Sequence[_Cast]) -> None:
        """Has the same casts in place while a backward through the output runs.

        The same: what a re-entrant checkpoint makes of them leads to the same parameters, and what
        another kind of checkpoint computes again has the values of the first time.
        """

        def begin() -> None:
            if self._in_backward:
                return
            self._in_backward = True
            put_back = _put_in_place(casts)

            def end(_: bool) -> None:
                self._in_backward = False
                put_back()

            at_end_of_backward(end)

        if torch.is_grad_enabled():
            on_backward(tensors_in(output), begin)


@torch.no_grad()
def cast_buffers(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts floating-point buffers for good, but for those that the module asks to ignore.

    Args:
        module: the module that has the buffers, which are written in place.
        dtype: the floating-point dtype that the buffers get.
    """
    ignored = ignored_names(module)
    for name, buffer in module.named_buffers():
        if name not in ignored and buffer.is_floating_point():
            buffer.data = buffer.to(dtype)


def _cast(module: nn.Module, param: Tensor, dtype: torch.dtype) -> Tensor:
    if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        cast: Tensor = _SparseCast.apply(param, dtype)  # type: ignore[no-untyped-call]
        return cast
    return param.to(dtype)


class _SparseCast(torch.autograd.Function):
    """A cast whose gradient may be sparse, which that of `Tensor.to` may not."""

    @staticmethod
    def forward(ctx: Any, param: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = param.dtype
        return param.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class _Cast(NamedTuple):
    module: nn.Module
    name: str
    tensor: Tensor


@untraced
def _put_in_place(casts: Sequence[_Cast]) -> Callable[[], None]:
    """Gives each module its casts for parameters; returns a function that undoes it.

    What was there before need not be a parameter: a forward within a backward finds casts. And a
    parameter that was assigned or deleted in the meantime is the user's, and stays.
    """
    before = [(cast, cast.module._parameters[cast.name]) for cast in casts if _has(cast)]
    for cast, _ in before:
        cast.module._parameters[cast.name] = cast.tensor  # type: ignore[assignment]
    recurrent = [m for m in {cast.module for cast in casts} if isinstance(m, nn.RNNBase)]
    references = [(m, m._flat_weights, m._flat_weight_refs) for m in recurrent]
    for module in recurrent:
        _refer_to_parameters(module)

    @untraced
    def put_back() -> None:
        for cast, param in before:
            if cast.module._parameters.get(cast.name) is cast.tensor:
                cast.module._parameters[cast.name] = param
        for module, weights, refs in references:
            module._flat_weights, module._flat_weight_refs = weights, refs

    return put_back


def _has(cast: _Cast) -> bool:
    return cast.name in cast.module._parameters


def _refer_to_parameters(module: nn.RNNBase) -> None:
    """Renews the list of parameters that recurrent modules keep, without their flattening.

    That would move the parameters, which on a GPU it does in place.
    """
    weights = [getattr(module, name, None) for name in module._flat_weights_names]
    module._flat_weights = weights
    module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]

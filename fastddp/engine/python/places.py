"""The place of one parameter's gradient, dense or sparse, and how a gradient gets there."""

from __future__ import annotations

from typing import Protocol

import torch

from fastddp.device.flat import widened, write
from fastddp.device.streams import home_of
from fastddp.engine.plan import Slot
from fastddp.engine.python.parameters import Layout, Parameter
from fastddp.engine.python.tensors import (
    empty_sparse,
    is_as_handed_out,
    real,
    resolved,
    scale_sparse,
    shares_storage,
)


class Place(Protocol):
    """The place where a parameter's gradient is put to be reduced, and lies once it is reduced."""

    param: Parameter
    flag: torch.Tensor
    """One element: whether any rank had a gradient."""

    def accept(self, grad: torch.Tensor) -> torch.Tensor:
        """Returns a gradient of backward's in a form that may be put here.

        Raises:
            TypeError: if the place is not for sparse gradients, and this is one.
            RuntimeError: if the shape cannot be that of the parameter.
        """

    def fit(self, grad: torch.Tensor) -> torch.Tensor:
        """Returns what the script has made of ``.grad`` in a form that may be put here.

        Raises:
            RuntimeError: if the shape cannot be that of the parameter.
        """

    def put(self, grad: torch.Tensor, scale: float) -> None:
        """Writes ``grad * scale``."""

    def put_leftover(self, grad: torch.Tensor, scale: float) -> None:
        """Writes ``grad * scale`` for a gradient that any stream may have made."""

    def add(self, grad: torch.Tensor, scale: float) -> None:
        """Adds ``grad * scale``."""

    def clear(self) -> None:
        """Writes zeros."""

    def holds(self, grad: torch.Tensor, /) -> bool:
        """Returns whether the gradient lies in the memory that the reduction overwrites."""

    def is_as_handed_out(self, grad: torch.Tensor, /) -> bool:
        """Returns whether the script has left ``.grad`` as the round before has set it."""

    def handed_out(self) -> torch.Tensor:
        """Returns what becomes ``.grad`` when the round is over."""


class DensePlace:
    """A slot in a bucket.

    Args:
        param: the hooked parameter.
        slot: memory of the reduced gradient, in the parameter's shape.
        sent: memory that is reduced, as real numbers: the slot, or the same part of the wire.
        flag: one element of the bucket's flags.
        rank: this rank's number, for messages.
    """

    __slots__ = ("_rank", "flag", "param", "sent", "slot")

    def __init__(
        self,
        param: Parameter,
        slot: torch.Tensor,
        sent: torch.Tensor,
        flag: torch.Tensor,
        rank: int,
    ) -> None:
        self.param = param
        self.slot = slot
        self.sent = sent
        self.flag = flag
        self._rank = rank

    def accept(self, grad: torch.Tensor) -> torch.Tensor:
        """See :class:`Place`."""
        if grad.is_sparse:
            raise TypeError(
                f"fastddp: rank {self._rank}: parameter '{self.param.name}' got a sparse"
                " gradient, but belongs to no torch.nn.Embedding or EmbeddingBag with sparse=True,"
                " which is what is looked for when a model is wrapped"
            )
        return self.fit(grad)

    def fit(self, grad: torch.Tensor) -> torch.Tensor:
        """Returns the gradient in the parameter's shape, whatever the script has made of it.

        A gradient that lies in the bucket's memory, but not exactly in the slot, is cloned.
        """
        grad = grad.to_dense() if grad.is_sparse else grad
        shape, slot = self.param.layout.shape, self.slot
        if grad.shape != shape:
            if grad.numel() != shape.numel():
                raise RuntimeError(
                    f"fastddp: rank {self._rank}: parameter '{self.param.name}' has shape"
                    f" {list(shape)}, but its .grad has shape {list(grad.shape)}; set .grad to"
                    " None or to a tensor of the parameter's shape before backward"
                )
            grad = grad.reshape(shape)
        in_slot = grad.data_ptr() == slot.data_ptr() and grad.stride() == slot.stride()
        return grad if in_slot or not shares_storage(grad, slot) else grad.clone()

    def put(self, grad: torch.Tensor, scale: float) -> None:
        """See :class:`Place`."""
        write(self.sent, real(resolved(grad)), scale)

    def put_leftover(self, grad: torch.Tensor, scale: float) -> None:
        """See :class:`Place`. The memory is kept until the current stream has read it."""
        self.put(grad, scale)
        stream = home_of(self.sent.device)
        if stream is not None:
            grad.record_stream(stream)

    def add(self, grad: torch.Tensor, scale: float) -> None:
        """See :class:`Place`."""
        self.sent.add_(widened(real(resolved(grad)), self.sent).mul(scale))

    def clear(self) -> None:
        """See :class:`Place`."""
        self.sent.zero_()

    def holds(self, grad: torch.Tensor, /) -> bool:
        """See :class:`Place`."""
        return shares_storage(grad, self.slot)

    def is_as_handed_out(self, grad: torch.Tensor, /) -> bool:
        """See :class:`Place`."""
        return is_as_handed_out(grad, self.slot)

    def handed_out(self) -> torch.Tensor:
        """Returns an alias of the slot, which belongs to the script; the slot stays here."""
        return self.slot.data


class SparsePlace:
    """A sparse gradient, which has no memory of its own in a bucket.

    Args:
        param: the hooked parameter, with one dimension of indices.
        flag: one element of the flags that travel apart from the buckets.
    """

    __slots__ = ("flag", "param", "value")

    def __init__(self, param: Parameter, flag: torch.Tensor) -> None:
        self.param = param
        self.flag = flag
        self.clear()

    def accept(self, grad: torch.Tensor) -> torch.Tensor:
        """See :class:`Place`."""
        return grad

    def fit(self, grad: torch.Tensor) -> torch.Tensor:
        """See :class:`Place`."""
        return grad

    def put(self, grad: torch.Tensor, scale: float) -> None:
        """See :class:`Place`."""
        self.value = scale_sparse(grad, scale)

    def put_leftover(self, grad: torch.Tensor, scale: float) -> None:
        """See :class:`Place`."""
        self.put(grad, scale)

    def add(self, grad: torch.Tensor, scale: float) -> None:
        """See :class:`Place`."""
        self.value = self.value + scale_sparse(grad, scale)

    def clear(self) -> None:
        """See :class:`Place`."""
        layout = self.param.layout
        self.value = empty_sparse(layout.shape, layout.dtype, layout.device)

    def holds(self, _: torch.Tensor, /) -> bool:
        """Returns False: the reduction makes new memory."""
        return False

    def is_as_handed_out(self, _: torch.Tensor, /) -> bool:
        """Returns False: a new tensor is handed out each time."""
        return False

    def handed_out(self) -> torch.Tensor:
        """See :class:`Place`."""
        return self.value


def make_slot(flat: torch.Tensor, slot: Slot, like: Layout, *, contiguous: bool) -> torch.Tensor:
    """Returns the slot in the parameter's shape, and with its strides unless ``contiguous``.

    The strides are the ones that the ranks have compared: the parameter's own may have changed on
    this rank alone. The slot shares the bucket's storage but is not a view to autograd, so
    ``grad.detach_()`` works.
    """
    dense = like.is_dense and not contiguous
    stride = like.stride if dense else torch.empty(like.shape, device="meta").stride()
    offset = slot.offset // 2 if like.dtype.is_complex else slot.offset
    storage = torch.empty(0, dtype=like.dtype, device=like.device)
    return storage.set_(flat.untyped_storage(), offset, like.shape, stride)

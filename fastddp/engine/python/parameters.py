"""A hooked parameter: the layout that the ranks compared, and what is known of its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from fastddp.engine.python.nodes import accumulator


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a parameter when it was hooked, which is what the ranks have compared."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    is_dense: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        """Describes a tensor of any shape, dtype and device."""
        dense = torch.ops.aten.is_non_overlapping_and_dense(tensor)
        return cls(tensor.shape, tuple(tensor.stride()), tensor.dtype, tensor.device, dense)

    def is_that_of(self, tensor: torch.Tensor) -> bool:
        """Returns whether the tensor has this layout."""
        return (
            tensor.dtype is self.dtype
            and tensor.shape == self.shape
            and tensor.stride() == self.stride
            and tensor.device == self.device
        )


class Parameter:
    """A parameter that a reducer hooks.

    Args:
        index: the position among the reducer's parameters, the same on every rank.
        tensor: the parameter itself.
        name: what messages call the parameter.
        is_sparse: whether the gradients are sparse.
    """

    def __init__(self, index: int, tensor: torch.nn.Parameter, name: str, is_sparse: bool) -> None:
        self.index = index
        self.tensor = tensor
        self.name = name
        self.is_sparse = is_sparse
        self.layout = Layout.of(tensor)
        self.expected = 1
        """How many gradients make the slot full: the most that one round has brought so far."""
        self.used = True
        """Whether any rank had a gradient when the flag was last read."""
        self.node: Node | None = None
        """The hooked node, kept alive here or the hook would vanish with it."""
        self._hook: RemovableHandle | None = None
        self._data_ptr = tensor.data_ptr()
        # The gradient that unsynchronised backwards have left, so long as nobody replaces or drops
        # it. The address alone could be that of a later tensor, so there is a weak reference too.
        self._left: tuple[int, Any] | None = None

    def hook(self, on_gradient: Callable[..., None]) -> None:
        """Has the function called, as a hook of the node, after each gradient of the parameter."""
        self.node = accumulator(self.tensor)
        self._hook = self.node.register_hook(on_gradient)

    def unhook(self) -> None:
        """Removes the hook, and lets go of the node."""
        if self._hook is not None:
            self._hook.remove()
        self.node = None

    def has_become_another(self) -> bool:
        """Returns whether the parameter has another layout or node than when it was hooked."""
        return self.node is None or not self.layout.is_that_of(self.tensor) or self._has_moved()

    def _has_moved(self) -> bool:
        """Returns whether autograd has another node for the parameter than the hooked one.

        Autograd makes a new node where ``set_`` gives the parameter other memory; ``.data =`` does
        not lead to a new node.
        """
        if self.tensor.data_ptr() == self._data_ptr:
            return False
        if accumulator(self.tensor) is not self.node:
            return True
        self._data_ptr = self.tensor.data_ptr()
        return False

    def note_left(self) -> None:
        """Takes note of the gradient that an unsynchronised backward has left in ``.grad``."""
        grad = self.tensor.grad
        if grad is None:  # a hook of the user's has taken it
            self._left = None
        else:
            self._left = grad._cdata, torch._C._WeakTensorRef(grad)  # type: ignore[attr-defined]

    def forget_left(self) -> None:
        """Takes note that the gradient of unsynchronised backwards has been reduced."""
        self._left = None

    def has_left(self, grad: torch.Tensor | None) -> bool:
        """Returns whether this is the gradient that unsynchronised backwards have left."""
        if grad is None or self._left is None:
            return False
        address, left = self._left
        return not left.expired() and grad._cdata == address

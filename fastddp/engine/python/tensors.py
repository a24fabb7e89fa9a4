"""Small functions on tensors: real views, aliases of a slot, sparse gradients."""

from __future__ import annotations

import torch


def real(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor, or a view of a complex one with real and imaginary parts side by side."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def resolved(grad: torch.Tensor) -> torch.Tensor:
    """Returns the gradient with its values in memory, not with a lazy conjugation or negation."""
    return grad.resolve_conj().resolve_neg()


def shares_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether two dense tensors lie in the same memory."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def is_alias(grad: torch.Tensor | None, slot: torch.Tensor) -> bool:
    """Returns whether the gradient begins where the slot does, in the same memory."""
    if grad is None or grad.layout != torch.strided or grad.data_ptr() != slot.data_ptr():
        return False
    return slot.numel() > 0 or shares_storage(grad, slot)


def is_as_handed_out(grad: torch.Tensor, slot: torch.Tensor) -> bool:
    """Returns whether the script has left the alias of a slot as it got it."""
    return (
        is_alias(grad, slot)
        and grad.shape == slot.shape
        and grad.stride() == slot.stride()
        and grad.dtype == slot.dtype
        and not grad.requires_grad
        and not grad.is_conj()
        and not grad.is_neg()
    )


def scale_sparse(grad: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns ``grad * scale`` with one dimension of indices, like an embedding's gradient."""
    return torch.mul(grad if grad.is_sparse else grad.to_sparse(1), scale)


def empty_sparse(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns a sparse gradient without any row, for a parameter of this shape and dtype."""
    indices = torch.empty(1, 0, dtype=torch.long, device=device)
    values = torch.empty(0, *shape[1:], dtype=dtype, device=device)
    return torch.sparse_coo_tensor(indices, values, shape)


def bytes_in(tensor: torch.Tensor) -> int:
    """Returns the bytes of the elements, and of a sparse tensor's indices."""
    if not tensor.is_sparse:
        return tensor.nbytes
    return tensor._indices().nbytes + tensor._values().nbytes


def put_back(param: torch.nn.Parameter, grad: torch.Tensor | None) -> None:
    """Makes ``grad`` the parameter's gradient again, also with a shape and dtype of the script's.

    Torch refuses to set such a ``.grad``, but a script may have changed it in place.
    """
    try:
        param.grad = grad
    except RuntimeError:
        assert grad is not None
        param.grad = torch.empty_like(param)
        param.grad.data = grad

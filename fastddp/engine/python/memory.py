"""Where the memory of buckets comes from, and who refers to it."""

from __future__ import annotations

import warnings

import torch

from fastddp.engine.python.context import Context


def allocate(numel: int, dtype: torch.dtype, context: Context) -> torch.Tensor:
    """Returns zeroed memory: shared by the ranks, where the group can allocate such memory.

    It is zeroed so that the padding between slots always adds up to zero.
    """
    device, group = context.device, context.group()
    try:
        backend = group._get_backend(device)
        if backend.supports_tensor_alloc(device):
            return backend.allocate_tensor(numel, dtype=dtype, device=device).zero_()
    except torch.OutOfMemoryError as error:
        warnings.warn(
            f"fastddp: rank {context.rank}: gradients are not in memory that the ranks share, so"
            f" reducing them takes several times as long: {error}",
            stacklevel=2,
        )
    except (RuntimeError, ValueError):  # not ready, as NCCL before its first collective
        pass
    return torch.zeros(numel, dtype=dtype, device=device)


def num_references(storage: torch.UntypedStorage) -> int:
    """Returns how many tensors and other objects refer to this memory."""
    return int(torch._C._storage_Use_Count(storage._cdata))

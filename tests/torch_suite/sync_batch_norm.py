"""SyncBatchNorm on the CPU: what torch has only CUDA kernels for, in plain torch.

The algorithm is batch normalisation (Ioffe and Szegedy, 2015) with all sums taken over all ranks.
Activations are (N, C, ...), statistics (C,) and float.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn

Optional = Tensor | None


def _over_channels(x: Tensor, values: Tensor) -> Tensor:
    """Shapes one value per channel, (C,), so that it broadcasts to ``x``, (N, C, ...)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    return x.float().transpose(0, 1).flatten(1).sum(1)


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.float().transpose(0, 1).flatten(1)
    return rows.mean(1), (rows.var(1, correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Optional,
    running_var: Optional,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Merges the statistics of the ranks, one row each, and updates the running ones."""
    total = counts.sum()
    weights = (counts / total).unsqueeze(1)
    all_mean = (weights * mean).sum(0)
    var = (weights * (invstd.pow(-2) - eps + (mean - all_mean).square())).sum(0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(all_mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * total / (total - 1)).to(running_var.dtype), momentum)
    return all_mean, (var + eps).rsqrt()


def batch_norm_elemt(
    x: Tensor, weight: Optional, bias: Optional, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    scale = invstd if weight is None else invstd * weight
    out = (x.float() - _over_channels(x, mean)) * _over_channels(x, scale)
    return (out if bias is None else out + _over_channels(x, bias)).to(x.dtype)


def batch_norm_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Optional,
    wants_x: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns this rank's sums: of the gradient, of it times the centred input, and scaled."""
    sum_dy = _sum(grad)
    sum_dy_xmu = _sum(grad.float() * (x.float() - _over_channels(x, mean)))
    dtype = x.dtype if weight is None else weight.dtype
    return sum_dy, sum_dy_xmu, (sum_dy_xmu * invstd).to(dtype), sum_dy.clone().to(dtype)


def batch_norm_backward_elemt(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Optional,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:
    """Returns the gradient of the input, from the sums over all ranks."""
    total = counts.sum()
    centred = x.float() - _over_channels(x, mean)
    slope = _over_channels(x, sum_dy_xmu / total * invstd.square())
    scale = invstd if weight is None else invstd * weight
    centred_grad = grad.float() - _over_channels(x, sum_dy / total) - centred * slope
    return (centred_grad * _over_channels(x, scale)).to(x.dtype)


_forward = nn.SyncBatchNorm.forward


def forward(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """The module's own forward, to which the CPU is a device of the kind that plug-ins add."""
    with mock.patch.object(torch._C, "_get_privateuse1_backend_name", return_value="cpu"):
        return _forward(self, x)


KERNELS = {
    function.__name__: function
    for function in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    )
}

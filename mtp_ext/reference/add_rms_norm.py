"""residual += x; RMS norm of the sum."""

import torch
from torch import Tensor


def add_rms_norm(
    residual: Tensor,
    weight: Tensor,
    *,
    x: Tensor | None = None,
    eps: float = 1e-6,
    gemma_norm: bool = False,
) -> Tensor:
    if x is not None:
        residual += x.float()
    mean_square = residual.double().square().mean(-1, keepdim=True)
    scale = weight.double() + 1 if gemma_norm else weight.double()
    return (residual.double() * torch.rsqrt(mean_square + eps) * scale).to(weight.dtype)

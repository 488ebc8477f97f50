"""A linear layer, accumulated in float64 and rounded once."""

import torch
from torch import Tensor


def skinny_linear(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, weight_scale: Tensor | None = None
) -> Tensor:
    out = x.to(torch.float64) @ weight.to(torch.float64).T
    if weight_scale is not None:
        out = out * weight_scale.to(torch.float64)
    if bias is not None:
        out = out + bias.to(torch.float64)
    return out.to(x.dtype)

"""concat(norm_e(embedding[ids]), norm_h(hidden)) @ weight.T + bias in float64, rounded once."""

import torch
from torch import Tensor

from mtp_ext.reference.skinny_linear import skinny_linear


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, gemma_norm: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps), scaled by weight or, Gemma-style, 1 + weight; None: x itself."""
    if weight is None:
        return x
    x = x.to(torch.float64)
    scale = weight.to(torch.float64) + (1.0 if gemma_norm else 0.0)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale


def eh_proj(
    token_ids: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    weight: Tensor,
    *,
    enorm_weight: Tensor | None = None,
    hnorm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    eps: float = 1e-6,
    gemma_norm: bool = False,
    hidden_first: bool = False,
) -> Tensor:
    known = (token_ids >= 0) & (token_ids < embedding.shape[0])
    if positions is not None:
        known = known & (positions != 0)
    e = torch.zeros_like(hidden)
    e[known] = embedding[token_ids[known].to(torch.int64)]
    e = rms_norm(e, enorm_weight, eps, gemma_norm).to(torch.float64)
    h = rms_norm(hidden, hnorm_weight, eps, gemma_norm).to(torch.float64)
    x = torch.cat([h, e] if hidden_first else [e, h], dim=-1)
    return skinny_linear(x, weight, bias=bias).to(hidden.dtype)

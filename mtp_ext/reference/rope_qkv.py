"""Splits a fused projection and rotates q and k by their positions, halves layout."""

import torch
from torch import Tensor


def rope_qkv(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = cos_sin.shape[1]
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([num_heads, num_kv_heads, num_kv_heads], 1)
    known = (positions >= 0) & (positions < len(cos_sin))
    table = cos_sin.double()[positions.where(known, 0)]
    cos, sin = table[:, None].chunk(2, -1)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.double().chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.where(known[:, None, None], turned, x.double()).to(x.dtype)

    return rotate(q), rotate(k), v.clone()

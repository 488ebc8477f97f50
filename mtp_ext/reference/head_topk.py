"""Full logits in float64, then top-k of their f32 roundings and the log-sum-exp."""

import torch
from torch import Tensor

from mtp_ext.reference.eh_proj import rms_norm
from mtp_ext.reference.skinny_linear import skinny_linear


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    eps: float = 1e-6,
    gemma_norm: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """f64 [M, V]."""
    x = rms_norm(hidden, norm_weight, eps, gemma_norm).to(torch.float64)
    logits = skinny_linear(x, weight, bias=bias, weight_scale=weight_scale)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def topk_lowest_id(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Descending; ties lowest id first; NaN is below -inf."""
    ranked = torch.where(logits.isnan(), -torch.inf, logits)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    is_nan = logits.isnan().gather(-1, order).to(torch.int8)
    order = order.gather(-1, torch.sort(is_nan, dim=-1, stable=True).indices)[:, :k]
    return logits.gather(-1, order), order


def head_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    norm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    token_map: Tensor | None = None,
    eps: float = 1e-6,
    gemma_norm: bool = False,
    softcap: float = 0.0,
    vocab_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    exact = head_logits(
        hidden,
        weight,
        norm_weight=norm_weight,
        bias=bias,
        weight_scale=weight_scale,
        eps=eps,
        gemma_norm=gemma_norm,
        softcap=softcap,
    )
    logits, rows = topk_lowest_id(exact.to(torch.float32), k)
    ids = rows + vocab_offset if token_map is None else token_map.to(torch.int64)[rows]
    return logits, ids, torch.logsumexp(exact, dim=-1).to(torch.float32)

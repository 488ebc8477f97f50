"""Full distributions of every row in float64; a Python loop over depths. Differentiable."""

import torch
from torch import Tensor

from mtp_ext.reference.linear_mtp_loss import (
    AccumulateWeightGradient,
    head_logits,
    target_positions,
    weighted_sum,
)


def teacher_probs(
    vocab: int,
    rows: Tensor,
    teacher_logits: Tensor | None,
    teacher_ids: Tensor | None,
    teacher_logprobs: Tensor | None,
) -> Tensor:
    """f64 [rows, V]; what pairs leave out is zero, so a row may sum to less than one."""
    if teacher_logits is not None:
        return torch.softmax(teacher_logits[rows], -1)
    ids = teacher_ids[rows].long()
    probs = teacher_logprobs[rows].double().exp()
    inside = (ids >= 0) & (ids < vocab)
    p = torch.zeros(len(rows), vocab, dtype=torch.float64)
    return p.scatter_add(1, ids.where(inside, 0), probs.where(inside, 0))


def soft_mtp_loss(
    hidden: Tensor,
    weight: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss_mask: Tensor | None = None,
    depth_weights: Tensor | None = None,
    bias: Tensor | None = None,
    weight_grad_accum: Tensor | None = None,
    first_shift: int = 2,
    kl_weight: float = 1.0,
    tv_weight: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    teacher_logits = None
    if teacher_hidden is not None:
        frozen = None if bias is None else bias.detach()
        teacher_logits = head_logits(teacher_hidden.detach(), weight.detach(), frozen, softcap)
    if weight_grad_accum is not None:
        weight = AccumulateWeightGradient.apply(weight, weight_grad_accum)
    depth_loss, num_tokens, acceptance = [], [], []
    for d, hidden_d in enumerate(hidden):
        pairs = target_positions(hidden.shape[1], d + first_shift - 1, cu_seqlens, loss_mask)
        rows, targets = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
        log_q = torch.log_softmax(head_logits(hidden_d[rows], weight, bias, softcap), -1)
        p = teacher_probs(weight.shape[0], targets, teacher_logits, teacher_ids, teacher_logprobs)
        kl = (torch.xlogy(p, p) - p * log_q.where(p > 0, 0)).sum(-1)
        overlap = torch.minimum(p, log_q.exp()).sum(-1)
        loss = kl_weight * kl + tv_weight * (1 - overlap)
        depth_loss.append(loss.sum() / max(len(rows), 1))
        num_tokens.append(len(rows))
        acceptance.append(overlap.detach().sum() / max(len(rows), 1))
    loss, depth_losses = weighted_sum(depth_loss, depth_weights)
    return loss, depth_losses.detach(), torch.tensor(num_tokens), torch.stack(acceptance)

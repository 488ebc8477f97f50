"""Full logits of every row in float64; a Python loop over depths and documents. Differentiable."""

import itertools

import torch
from torch import Tensor


def target_positions(
    t: int, shift: int, cu_seqlens: Tensor | None, loss_mask: Tensor | None
) -> list[tuple[int, int]]:
    """(row, position it is compared with) of one depth, where both lie in one document."""
    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    bounds = torch.tensor(bounds).clamp(0, t).cummax(0).values.tolist()
    return [
        (target - shift, target)
        for begin, end in itertools.pairwise(bounds)
        for target in range(begin + shift, end)
        if loss_mask is None or bool(loss_mask[target])
    ]


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


class AccumulateWeightGradient(torch.autograd.Function):
    """The identity; its gradient goes into a buffer instead of on to the weight."""

    @staticmethod
    def forward(ctx, weight: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        ctx.buffer += grad.to(ctx.buffer.dtype)
        return None, None


def weighted_sum(depth_loss: list[Tensor], depth_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(loss, depth_loss) as the operators return them, but in float64."""
    losses = torch.stack(depth_loss)
    k = len(depth_loss)
    weights = torch.full((k,), 1 / k) if depth_weights is None else depth_weights
    return (weights.to(losses) * losses).sum(), losses


def linear_mtp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    loss_mask: Tensor | None = None,
    depth_weights: Tensor | None = None,
    bias: Tensor | None = None,
    weight_grad_accum: Tensor | None = None,
    first_shift: int = 2,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if weight_grad_accum is not None:
        weight = AccumulateWeightGradient.apply(weight, weight_grad_accum)
    vocab = weight.shape[0]
    depth_loss, num_tokens, num_correct = [], [], []
    for d, hidden_d in enumerate(hidden):
        pairs = [
            (row, int(labels[target]))
            for row, target in target_positions(
                hidden.shape[1], d + first_shift, cu_seqlens, loss_mask
            )
            if 0 <= labels[target] < vocab and labels[target] != ignore_index
        ]
        rows, y = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
        logits = head_logits(hidden_d[rows], weight, bias, softcap)
        lse = torch.logsumexp(logits, -1)
        picked = logits.gather(1, y[:, None])[:, 0]
        # As torch.nn.functional.cross_entropy smooths: the target is mixed with the uniform.
        loss = lse - (1 - label_smoothing) * picked - label_smoothing * logits.mean(-1)
        loss = loss + z_loss * lse**2
        depth_loss.append(loss.sum() / max(len(y), 1))
        num_tokens.append(len(y))
        num_correct.append(int((logits.argmax(-1) == y).sum()))
    loss, depth_losses = weighted_sum(depth_loss, depth_weights)
    return loss, depth_losses.detach(), torch.tensor(num_tokens), torch.tensor(num_correct)

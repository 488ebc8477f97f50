"""One draw per request from the softmax over its k kept logits."""

import math

import torch
from torch import Tensor

from .rejection_sample import STREAM_DRAFT, exponentials


def draft_sample(
    topk_logits: Tensor,
    topk_ids: Tensor,
    seeds: Tensor,
    positions: Tensor,
    row: int,
    *,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, k = topk_logits.shape
    token_ids = torch.zeros(batch, dtype=torch.int64)
    probs = torch.zeros(batch, k)
    for b in range(batch):
        logits, ids = topk_logits[b].cpu().double(), topk_ids[b].cpu().long()
        t = 0.0 if temperature is None else temperature[b].item()
        finite = logits.isfinite()
        faulty = bool((logits.isnan() | (logits == math.inf)).any()) or not bool(finite.any())
        if faulty or not 0 < t < math.inf:
            # Greedy, and whatever is out of range: the best finite logit, lowest id on ties.
            logits = logits.where(finite, torch.tensor(-math.inf).double())
            score = (logits == logits.max()).double()
            probs[b, ids.where(score > 0, torch.tensor(2**63 - 1)).argmin()] = 1.0
        else:
            probs[b] = ((logits - logits.max()) / t).softmax(0).float()
            e = exponentials(seeds[b : b + 1].cpu(), positions[b : b + 1].cpu(), row, STREAM_DRAFT,
                             ids)  # fmt: skip
            score = probs[b].double() / e
        token_ids[b] = ids[score == score.max()].min()
    return token_ids.to(topk_logits.device), probs.to(topk_logits.device)

"""Exact rejection sampling from raw logits, one request at a time, in f64."""

import math

import torch
from torch import Tensor

from .philox_uniform import philox_uniform, philox_words

BAD_TARGET, BAD_DRAFT_PROB, BAD_DRAFT_ID, BAD_PARAMETER = 1, 2, 4, 8
STREAM_DRAFT, STREAM_ACCEPT, STREAM_FINAL = 0, 1, 2


def exponentials(seed: Tensor, position: Tensor, row: int, stream: int, ids: Tensor) -> Tensor:
    """The exponential variate of each id, f64 [n]. seed, position int64 [1]; ids [n]."""
    words = philox_words(seed, position, row, stream, ids)[0]
    x = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log1p(-x.double())


def race(weights: Tensor, seed: Tensor, position: Tensor, row: int) -> int:
    """Draws an id with probability proportional to its weight: argmax of weight / exponential."""
    ids = torch.arange(len(weights))
    return int((weights / exponentials(seed, position, row, STREAM_FINAL, ids)).argmax())


def target_distribution(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, bool]:
    """The filtered target distribution, f64 [V], and whether the row was faulty.

    Masked entries are -inf already. temperature 0 is greedy, top_k 0, top_p 1, min_p 0 are off.
    """
    logits = logits.double()
    finite = logits.isfinite()
    faulty = bool((logits.isnan() | (logits == math.inf)).any()) or not bool(finite.any())
    if faulty or temperature == 0:
        p = torch.zeros_like(logits)
        # argmax takes the lowest id of equals, and id 0 where nothing is finite.
        p[logits.where(finite, torch.tensor(-math.inf).double()).argmax()] = 1.0
        return p, faulty

    weights = ((logits - logits.max()) / temperature).exp()
    # Every filter keeps a prefix of this order: descending logit, ascending id.
    order = logits.sort(descending=True, stable=True).indices
    kept = len(order)
    if min_p > 0:
        bound = logits.max() + temperature * math.log(min_p)
        kept = int((logits >= bound).sum())
    if top_k > 0:
        kept = min(kept, top_k)
    if top_p < 1:
        mass = weights[order[:kept]].cumsum(0)
        kept = 1 + int((mass[:-1] < top_p * mass[-1]).sum())
    p = torch.zeros_like(weights)
    p[order[:kept]] = weights[order[:kept]]
    return p / p.sum(), False


def _parameters(temperature: float, top_k: int, top_p: float, min_p: float) -> tuple:
    """The four with what is out of range switched off, and the status bit."""
    status = 0
    if not 0 <= temperature < math.inf:
        temperature, status = 0.0, BAD_PARAMETER
    if not 0 <= top_p <= 1:
        top_p, status = 1.0, BAD_PARAMETER
    if not 0 <= min_p <= 1:
        min_p, status = 0.0, BAD_PARAMETER
    return (temperature, max(top_k, 0), top_p, min_p), status


def _bad_prob(q: Tensor) -> bool:
    return bool((~(q >= 0) | q.isinf()).any())


def rejection_sample(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    cu_draft_lens: Tensor,
    seeds: Tensor,
    positions: Tensor,
    max_draft_len: int,
    *,
    draft_probs: Tensor | None = None,
    draft_ids: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    token_bitmask: Tensor | None = None,
    method: str = "token",
) -> tuple[Tensor, Tensor, Tensor]:
    assert method in ("token", "block")
    batch, vocab = len(seeds), target_logits.shape[1]
    num_drafts = len(draft_token_ids)
    token_ids = torch.full((batch, max_draft_len + 1), -1, dtype=torch.int32)
    num_accepted = torch.zeros(batch, dtype=torch.int32)
    status = torch.zeros(batch, dtype=torch.int32)

    def draft_distribution(row: int) -> Tensor:
        """q of a draft row, f64 [V]."""
        if draft_probs is None:
            q = torch.zeros(vocab, dtype=torch.float64)
            q[int(draft_token_ids[row])] = 1.0
        elif draft_ids is None:
            q = draft_probs[row].cpu().double()
        else:
            q = torch.zeros(vocab, dtype=torch.float64)
            ids = draft_ids[row].tolist()
            # Back to front, so that the first of equal ids decides.
            for id, prob in zip(reversed(ids), reversed(draft_probs[row].tolist())):
                if 0 <= id < vocab:
                    q[id] = prob
        return q

    for b in range(batch):
        value = lambda t, off: off if t is None else t[b].item()  # noqa: B023, E731
        parameters, bits = _parameters(
            value(temperature, 0.0), value(top_k, 0), value(top_p, 1.0), value(min_p, 0.0)
        )
        greedy = parameters[0] == 0
        start = min(max(int(cu_draft_lens[b]), 0), num_drafts)
        end = min(max(int(cu_draft_lens[b + 1]), start), num_drafts)
        n = min(end - start, max_draft_len)
        seed, position = seeds[b : b + 1].cpu(), positions[b : b + 1].cpu()
        drafts = draft_token_ids[start : start + n].tolist()

        def target(r: int) -> Tensor:
            """p of row r of this request; remembers a fault."""
            nonlocal bits
            logits = target_logits[start + b + r].cpu().float()  # noqa: B023
            if token_bitmask is not None:
                words = token_bitmask[start + b + r].cpu()  # noqa: B023
                ids = torch.arange(vocab)
                allowed = (words[ids // 32] >> (ids % 32) & 1).bool()
                logits = logits.where(allowed, torch.tensor(-math.inf))
            p, faulty = target_distribution(logits, *parameters)  # noqa: B023
            bits |= BAD_TARGET if faulty else 0
            return p

        def coin(r: int) -> float:
            return philox_uniform(seed, position, r, STREAM_ACCEPT, 1).item()  # noqa: B023

        if greedy or method == "token":
            for accepted in range(n + 1):
                p = weights = target(accepted)
                if accepted == n:
                    break
                draft = drafts[accepted]
                if not 0 <= draft < vocab:
                    bits |= BAD_DRAFT_ID
                    break
                if greedy:
                    if p[draft] == 1:
                        continue
                    break
                q = draft_distribution(start + accepted)
                if _bad_prob(q[draft]):
                    bits |= BAD_DRAFT_PROB
                    break
                if coin(accepted) * q[draft] < p[draft]:
                    continue
                if _bad_prob(q):
                    bits |= BAD_DRAFT_PROB
                    break
                weights = (p - q).clamp(min=0)
                break
        else:
            for r in range(n):
                if not 0 <= drafts[r] < vocab:
                    bits |= BAD_DRAFT_ID
                    n = r
                    break
                if _bad_prob(draft_distribution(start + r)):
                    bits |= BAD_DRAFT_PROB
                    n = r
                    break
            ps = [target(r) for r in range(n + 1)]
            qs = [draft_distribution(start + r) for r in range(n)]
            product, accepted = 1.0, 0
            p, weights = ps[0], ps[0] if n == 0 else (ps[0] - qs[0]).clamp(min=0)
            for i in range(1, n + 1):
                gain = product * float(ps[i - 1][drafts[i - 1]])
                q_draft = float(qs[i - 1][drafts[i - 1]])
                # gain >= q_draft covers q_draft == 0; a product of 0 stays 0.
                product = 0.0 if gain == 0 else 1.0 if gain >= q_draft else gain / q_draft
                if i == n:
                    h, residual = product, ps[n]
                else:
                    residual = (product * ps[i] - qs[i]).clamp(min=0)
                    total = float(residual.sum())
                    h = total / (total + 1 - product) if total + 1 - product > 0 else 1.0
                if coin(i - 1) < h:
                    accepted, p, weights = i, ps[i], residual

        if not bool((weights > 0).any()):
            weights = p
        final = int(p.argmax()) if greedy else race(weights, seed, position, accepted)
        token_ids[b, : accepted + 1] = torch.tensor([*drafts[:accepted], final])
        num_accepted[b] = accepted
        status[b] = bits

    device = target_logits.device
    return token_ids.to(device), num_accepted.to(device), status.to(device)

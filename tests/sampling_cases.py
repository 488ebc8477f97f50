"""Random calls of rejection_sample for its tests."""

from __future__ import annotations

import torch
from torch import Tensor


def make_call(
    seed: int,
    lens: list[int],
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    q: str = "dense",
    filters: str = "",
    bitmask: bool = False,
    method: str = "token",
    greedy: float = 0.0,
    spread: float = 3.0,
    closeness: float = 0.7,
    width: int = 6,
    max_draft_len: int | None = None,
    index: torch.dtype = torch.int64,
) -> tuple[tuple, dict]:
    """Arguments of one call. `filters` holds any of the letters k, p, m; `greedy` is the share of
    greedy requests; drafts are drawn from a q that resembles the target by `closeness`."""
    g = torch.Generator().manual_seed(seed)
    batch, total = len(lens), sum(lens)
    target = (torch.randn(total + batch, vocab, generator=g) * spread).to(dtype)
    cu = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    rows = [int(cu[b]) + b + r for b in range(batch) for r in range(lens[b])]
    noise = torch.randn(total, vocab, generator=g) * spread
    dense = (closeness * target[rows].float() + (1 - closeness) * noise).softmax(-1)
    kwargs: dict = {"method": method, "temperature": torch.rand(batch, generator=g) + 0.5}
    kwargs["temperature"][torch.rand(batch, generator=g) < greedy] = 0.0
    width = min(width, vocab)
    if q == "sparse":
        probs, ids = dense.topk(width)
        kwargs["draft_probs"] = probs / probs.sum(-1, keepdim=True)
        kwargs["draft_ids"] = ids.to(index)
        pick = torch.multinomial(kwargs["draft_probs"], 1, generator=g) if total else ids[:, :1]
        drafts = ids.gather(1, pick)[:, 0]
    else:
        drafts = (torch.multinomial(dense, 1, generator=g) if total else dense[:, :1].long())[:, 0]
        if q == "dense":
            kwargs["draft_probs"] = dense
    if "k" in filters:
        kwargs["top_k"] = torch.randint(0, max(2, vocab // 3), (batch,), generator=g).int()
    if "p" in filters:
        kwargs["top_p"] = torch.rand(batch, generator=g)
    if "m" in filters:
        kwargs["min_p"] = torch.rand(batch, generator=g) * 0.2
    if bitmask:
        words = (total + batch, (vocab + 31) // 32)
        mask = torch.randint(-(2**31), 2**31, words, generator=g, dtype=torch.int32)
        kwargs["token_bitmask"] = mask
    args = (
        target,
        drafts.to(index),
        cu,
        torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g),
        torch.randint(0, 2**40, (batch,), generator=g),
        max(lens, default=0) if max_draft_len is None else max_draft_len,
    )
    return args, kwargs


def to_device(args: tuple, kwargs: dict, device: str) -> tuple[tuple, dict]:
    def move(x):
        return x.to(device) if isinstance(x, Tensor) else x

    return tuple(map(move, args)), {k: move(v) for k, v in kwargs.items()}

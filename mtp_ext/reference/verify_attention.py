"""Attention of the new tokens over the paged cache and themselves, one row after the other."""

import math

import torch
from torch import Tensor

from mtp_ext.reference.kv_append import (
    as_nhd,
    decode,
    encode,
    find_slot,
    kv_append,
    row_ranges,
)


def verify_attention_f64(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_lens: Tensor,
    cu_q_lens: Tensor,
    max_q_len: int,
    *,
    tree_mask: Tensor | None = None,
    scale: float | None = None,
    window: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    layout: str = "NHD",
) -> tuple[Tensor, Tensor]:
    """`verify_attention` before its results are rounded: out and lse in f64."""
    total, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    ranges = [span[:max_q_len] for span in row_ranges(cu_q_lens, total)]

    # Append. Rows behind max_q_len are padding.
    kept = [t for span in ranges for t in span]
    kept_lens = torch.tensor([0] + [len(span) for span in ranges], dtype=torch.int32)
    kv_append(
        k[kept], v[kept], k_cache, v_cache, block_table, cache_lens, kept_lens.cumsum(0),
        k_scale=k_scale, v_scale=v_scale, layout=layout,
    )  # fmt: skip

    # Attend.
    out = torch.zeros(total, q_heads, dim, dtype=torch.float64, device=q.device)
    lse = torch.full((total, q_heads), -math.inf, dtype=torch.float64, device=q.device)
    cached_k, cached_v = as_nhd(k_cache, layout), as_nhd(v_cache, layout)
    num_pages, page_size = cached_k.shape[:2]
    new_k = decode(encode(k, k_cache.dtype, k_scale), k_scale)
    new_v = decode(encode(v, v_cache.dtype, v_scale), v_scale)
    for b, span in enumerate(ranges):
        length, count = max(int(cache_lens[b]), 0), len(span)
        if count == 0:
            continue
        # The new tokens' positions, and which of them each row may see.
        sees = torch.ones(count, count, dtype=torch.bool).tril()
        depth = torch.arange(count)
        if tree_mask is not None:
            bits = tree_mask[span.start : span.stop].cpu()
            sees = (bits[:, None] >> torch.arange(count) & 1).bool()
            depth = sees.sum(1) - 1
        query_position = length + depth

        # Every key that has a slot: its position and values.
        capacity = block_table.shape[1] * page_size
        slots = {
            p: find_slot(block_table, b, p, page_size, num_pages)
            for p in range(min(length + count, capacity))
        }
        old = [p for p, slot in slots.items() if slot is not None and p < length]
        new = [p - length for p, slot in slots.items() if slot is not None and p >= length]
        keys, values = [new_k[span.start : span.stop][new]], [new_v[span.start : span.stop][new]]
        if old:
            pages, offsets = torch.tensor([slots[p] for p in old]).T
            keys.insert(0, decode(cached_k[pages, offsets], k_scale))
            values.insert(0, decode(cached_v[pages, offsets], v_scale))
        keys, values = torch.cat(keys), torch.cat(values)
        key_position = torch.cat([torch.tensor(old, dtype=torch.int64), length + depth[new]])
        visible = torch.cat([torch.ones(count, len(old), dtype=torch.bool), sees[:, new]], 1)
        if window >= 1:
            visible &= key_position > query_position[:, None] - window

        for i, t in enumerate(span):
            seen = visible[i].to(q.device)
            for h in range(q_heads):
                g = h // (q_heads // kv_heads)
                scores = keys[seen, g] @ q[t, h].double() * scale
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                logits = scores if sinks is None else torch.cat([scores, sinks[h : h + 1].double()])
                if logits.numel() == 0:
                    continue
                lse[t, h] = torch.logsumexp(logits, 0)
                out[t, h] = (scores - lse[t, h]).exp() @ values[seen, g]
    return out, lse


def verify_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_lens: Tensor,
    cu_q_lens: Tensor,
    max_q_len: int,
    *,
    tree_mask: Tensor | None = None,
    scale: float | None = None,
    window: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    layout: str = "NHD",
) -> tuple[Tensor, Tensor]:
    out, lse = verify_attention_f64(
        q, k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, max_q_len,
        tree_mask=tree_mask, scale=scale, window=window, softcap=softcap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, layout=layout,
    )  # fmt: skip
    return out.to(q.dtype), lse.float()

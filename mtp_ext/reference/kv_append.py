"""New keys and values written into the paged cache, one token after the other.

The address rules of the paged cache live here; `verify_attention` and `kv_compact` share them.
"""

import itertools

import torch
from torch import Tensor

E4M3_MAX = 448.0


def row_ranges(cu_q_lens: Tensor, total: int) -> list[range]:
    """The rows of each request. Offsets are clamped to 0..total and never decrease."""
    offsets, last = [], 0
    for offset in cu_q_lens.tolist():
        last = max(last, min(offset, total))
        offsets.append(last)
    return [range(begin, end) for begin, end in itertools.pairwise(offsets)]


def find_slot(
    block_table: Tensor, b: int, position: int, page_size: int, num_pages: int
) -> tuple[int, int] | None:
    """Page and slot of a position, or None: past the table's capacity, or no such page."""
    if position >= block_table.shape[1] * page_size:
        return None
    page = int(block_table[b, position // page_size])
    return (page, position % page_size) if 0 <= page < num_pages else None


def as_nhd(cache: Tensor, layout: str) -> Tensor:
    """A view [P, page, Hkv, D] of a cache of either layout."""
    if layout not in ("NHD", "HND"):
        raise RuntimeError(f'layout must be "NHD" or "HND", got "{layout}"')
    return cache if layout == "NHD" else cache.transpose(1, 2)


def encode(rows: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Rows [T, Hkv, D] as the cache stores them."""
    if dtype != torch.float8_e4m3fn:
        return rows
    divisor = 1.0 if scale is None else scale[:, None]
    return (rows.float() / divisor).clamp(-E4M3_MAX, E4M3_MAX).to(dtype)


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """What stored rows [.., Hkv, D] mean, in f64."""
    return stored.double() if scale is None else stored.double() * scale.double()[:, None]


def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_lens: Tensor,
    cu_q_lens: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    layout: str = "NHD",
) -> None:
    for rows, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        stored = encode(rows, cache.dtype, scale)
        cache = as_nhd(cache, layout)
        num_pages, page_size = cache.shape[:2]
        for b, span in enumerate(row_ranges(cu_q_lens, k.shape[0])):
            length = max(int(cache_lens[b]), 0)
            for i, t in enumerate(span):
                slot = find_slot(block_table, b, length + i, page_size, num_pages)
                if slot is not None:
                    cache[slot] = stored[t]

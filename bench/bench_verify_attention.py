"""Attention of the new rows over a paged cache, appended in the same call: one cache read."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, optional, random_values

DTYPE = torch.bfloat16


def eager(q, k, v, k_cache, v_cache, table, lens, offsets, slots, mask):
    """`slots` and `mask` are made once per step, before the loop over layers."""
    batch = table.shape[0]
    for rows, cache in ((k, k_cache), (v, v_cache)):
        cache.flatten(0, 1).index_copy_(0, slots, rows)
    keys, values = (
        cache[table.long()].flatten(1, 2)[:, : mask.shape[-1]].transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    queries = q.view(batch, -1, *q.shape[1:]).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).reshape(q.shape)


def make_flash_attn(batch: int) -> Callable | None:
    def build(flash_attn: Any) -> Callable:
        def call(q, k, v, k_cache, v_cache, table, lens, offsets, slots, mask):
            q, k, v = (x.view(batch, -1, *x.shape[1:]) for x in (q, k, v))
            return flash_attn.flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, cache_seqlens=lens, block_table=table, causal=True
            )

        return call

    return optional("flash_attn", build)


def make_flashinfer(page: int) -> Callable | None:
    """The append and the attention. Planned at the first call, from the page table that all input
    sets share; planning reads it back to the host, so it is not timed."""

    def build(flashinfer: Any) -> Callable:
        plans: list[tuple] = []

        def plan(q: Tensor, k: Tensor, table: Tensor, lens: Tensor, offsets: Tensor) -> tuple:
            totals = lens + offsets.diff()
            pages = torch.arange(table.shape[0] + 1, device=q.device).int() * table.shape[1]
            last = (totals - 1) % page + 1
            workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=q.device)
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            wrapper.plan(
                offsets, pages, table.flatten(), last, q.shape[1], k.shape[1], q.shape[2], page,
                causal=True, q_data_type=q.dtype,
            )  # fmt: skip
            where = flashinfer.get_batch_indices_positions(offsets, totals, q.shape[0])
            return wrapper, where, (table.flatten(), pages, last)

        def call(q, k, v, k_cache, v_cache, table, lens, offsets, slots, mask):
            if not plans:
                plans.append(plan(q, k, table, lens, offsets))
            wrapper, where, pages = plans[0]
            flashinfer.append_paged_kv_cache(k, v, *where, (k_cache, v_cache), *pages)
            return wrapper.run(q, (k_cache, v_cache))

        return call

    return optional("flashinfer", build)


def case(
    device: str, batch: int, q_len: int, context: int, q_heads: int, kv_heads: int, dim: int
) -> Case:
    page = 256 if device == "cuda" else 16  # flash-attn pages are multiples of 256
    per_request = -(-(context + q_len) // page)
    pages = batch * per_request
    table = torch.randperm(pages, device=device).view(batch, per_request).int()
    lens = torch.full((batch,), context, device=device, dtype=torch.int32)
    offsets = torch.arange(batch + 1, device=device, dtype=torch.int32) * q_len
    positions = context + torch.arange(q_len, device=device)
    slots = (table[:, positions // page] * page + positions % page).flatten().long()
    mask = torch.arange(context + q_len, device=device) <= positions[:, None]

    def make() -> tuple:
        q, k, v = (
            torch.randn(batch * q_len, heads, dim, device=device, dtype=DTYPE)
            for heads in (q_heads, kv_heads, kv_heads)
        )
        caches = [
            random_values(pages, page, kv_heads, dim, dtype=DTYPE, device=device) for _ in range(2)
        ]
        return q, k, v, *caches, table, lens, offsets, slots, mask

    def ours(ops, *inputs):
        return ops.verify_attention(*inputs[:8], q_len)[0]

    rows = batch * q_len
    new = 2 * rows * kv_heads * dim * DTYPE.itemsize
    query = rows * q_heads * dim * DTYPE.itemsize
    return Case(
        shape=f"B={batch} q={q_len} ctx={context} heads={q_heads}/{kv_heads}x{dim}",
        dtype="bf16",
        make=make,
        ours=ours,
        read=2 * batch * context * kv_heads * dim * DTYPE.itemsize + new + query,
        written=new + query + rows * q_heads * 4,
        flops=4 * rows * q_heads * dim * (context + q_len),
        peers={
            "eager": eager,
            "flash_attn": make_flash_attn(batch),
            "flashinfer": make_flashinfer(page),
        },
        check=lambda mine, theirs: torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.02),
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    if small:
        grid = [(2, 3, 130, 6, 2, 64)]
    else:
        grid = [(4, q, 4096, 9, 3, 64) for q in (1, 4)]
        grid += [(4, q, 4096, 32, 8, 128) for q in (1, 4)]
        grid += [(1, q, 16384, 9, 3, 64) for q in (1, 4, 8)]
    for shape in grid:
        yield case(device, *shape)

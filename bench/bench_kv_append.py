"""New keys and values scattered into the paged cache: each byte is read once and written once."""

from collections.abc import Iterator

import torch

from bench.harness import Case
from bench.report import dtype_name

PAGE, CONTEXT = 16, 64


def eager(k, v, k_cache, v_cache, table, lens, offsets, slots):
    """`slots` is what a user would compute once per step, before the loop over layers."""
    for rows, cache in ((k, k_cache), (v, v_cache)):
        if cache.dtype != rows.dtype:
            rows = rows.clamp(-448, 448).to(cache.dtype).view(torch.uint8)
            cache = cache.view(torch.uint8)
        cache.flatten(0, 1).index_copy_(0, slots, rows)
    return k_cache, v_cache


def case(device: str, batch: int, q: int, heads: int, dim: int, cache_dtype: torch.dtype) -> Case:
    dtype = torch.bfloat16

    def ours(ops, k, v, k_cache, v_cache, table, lens, offsets, slots):
        ops.kv_append(k, v, k_cache, v_cache, table, lens, offsets)
        return k_cache, v_cache

    def make() -> tuple:
        per_request = -(-(CONTEXT + q) // PAGE)
        pages = batch * per_request
        k, v = (torch.randn(batch * q, heads, dim, device=device).to(dtype) for _ in range(2))
        caches = [torch.zeros(pages, PAGE, heads, dim, device=device, dtype=dtype)] * 2
        caches = [cache.to(cache_dtype, copy=True) for cache in caches]
        table = torch.randperm(pages, device=device).view(batch, per_request).int()
        lens = torch.randint(0, CONTEXT, (batch,), device=device, dtype=torch.int32)
        offsets = torch.arange(batch + 1, device=device, dtype=torch.int32) * q
        positions = (lens[:, None] + torch.arange(q, device=device)).long()
        slots = table.gather(1, positions // PAGE) * PAGE + positions % PAGE
        return k, v, *caches, table, lens, offsets, slots.flatten()

    def check(mine: tuple, theirs: tuple) -> None:
        for a, b in zip(mine, theirs):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))

    elements = 2 * batch * q * heads * dim
    return Case(
        shape=f"B={batch} q={q} heads={heads}x{dim}",
        dtype="bf16" if cache_dtype == dtype else f"bf16 to {dtype_name(cache_dtype)}",
        make=make,
        ours=ours,
        read=elements * dtype.itemsize + batch * (4 + 4 + 4),
        written=elements * cache_dtype.itemsize,
        peers={"eager": eager},
        check=check,
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for shape in [(3, 4, 2, 64)] if small else [(b, 4, 8, 128) for b in (1, 32, 256)]:
            yield case(device, *shape, dtype)

"""Accepted tree slots moved down in every layer: one call, against a gather and a scatter each."""

from collections.abc import Iterator

import torch

from bench.harness import Case, random_values

PAGE, CONTEXT = 16, 8


def eager(k_caches, v_caches, table, lens, index, counts, source, target):
    for cache in (*k_caches, *v_caches):
        rows = cache.flatten(0, 1)
        rows.index_copy_(0, target, rows.index_select(0, source))
    return k_caches, v_caches


def case(device: str, batch: int, layers: int, accepted: int, heads: int, dim: int) -> Case:
    dtype, tree = torch.bfloat16, 2 * accepted

    def ours(ops, k_caches, v_caches, table, lens, index, counts, source, target):
        ops.kv_compact(k_caches, v_caches, table, lens, index, counts)
        return k_caches, v_caches

    def make() -> tuple:
        per_request = -(-(CONTEXT + tree) // PAGE)
        pages = batch * per_request
        shape = (pages, PAGE, heads, dim)
        caches = [
            [random_values(*shape, dtype=dtype, device=device) for _ in range(layers)]
            for _ in range(2)
        ]
        table = torch.randperm(pages, device=device).view(batch, per_request).int()
        lens = torch.full((batch,), CONTEXT, device=device, dtype=torch.int32)
        # The accepted path sits at 1, 3, 5, ...: every one of its slots moves.
        index = (2 * torch.arange(accepted, device=device) + 1).repeat(batch, 1)
        counts = torch.full((batch,), accepted, device=device, dtype=torch.int32)

        def slots(offsets: torch.Tensor) -> torch.Tensor:
            positions = lens[:, None].long() + offsets
            return (table.gather(1, positions // PAGE) * PAGE + positions % PAGE).flatten()

        target = torch.arange(accepted, device=device).expand(batch, -1)
        return *caches, table, lens, index.int(), counts, slots(index), slots(target)

    moved = 2 * layers * batch * accepted * heads * dim * dtype.itemsize
    return Case(
        shape=f"B={batch} layers={layers} accepted={accepted} heads={heads}x{dim}",
        dtype="bf16",
        make=make,
        ours=ours,
        read=moved + batch * (accepted * 4 + 4 + 4),
        written=moved,
        peers={"eager": eager},
        compile=False,  # a graph of 60 scatters takes minutes to compile
        check=torch.testing.assert_close,
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    grid = [(3, 2, 4, 2, 64)] if small else [(1, 30, 4, 3, 64), (1, 32, 4, 8, 128)]
    for shape in grid if small else [*grid, (16, 32, 4, 8, 128)]:
        yield case(device, *shape)

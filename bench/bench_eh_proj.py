"""The input projection of an MTP depth: H x 2H weights streamed for a few rows."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, random_values
from bench.report import dtype_name

VOCABULARY = 1024  # rows of the embedding table; a call gathers M of them


def eager(ids: Tensor, hidden: Tensor, table: Tensor, weight: Tensor, enorm: Tensor, hnorm: Tensor):
    size = hidden.shape[-1:]
    e = F.rms_norm(F.embedding(ids, table), size, enorm, 1e-6)
    return F.linear(torch.cat([e, F.rms_norm(hidden, size, hnorm, 1e-6)], dim=-1), weight)


def case(device: str, m: int, h: int, dtype: torch.dtype) -> Case:
    options = {"device": device, "dtype": dtype}

    def make() -> tuple:
        ids = torch.randint(0, VOCABULARY, (m,), device=device)
        table, hidden = (random_values(n, h, **options) for n in (VOCABULARY, m))
        weight = random_values(h, 2 * h, scale=(2 * h) ** -0.5, **options)
        enorm, hnorm = (torch.rand(h, **options) + 0.5 for _ in range(2))
        return ids, hidden, table, weight, enorm, hnorm

    return Case(
        shape=f"M={m} H={h}",
        dtype=dtype_name(dtype),
        make=make,
        ours=lambda ops, ids, hidden, table, weight, enorm, hnorm: ops.eh_proj(
            ids, hidden, table, weight, enorm_weight=enorm, hnorm_weight=hnorm
        ),
        read=dtype.itemsize * (2 * h * h + 2 * m * h + 2 * h) + 8 * m,
        written=dtype.itemsize * m * h,
        flops=4 * m * h * h,
        peers={"eager": eager},
        check=lambda ours, peer: torch.testing.assert_close(ours, peer, rtol=0.05, atol=0.05),
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    bf16, f32 = torch.bfloat16, torch.float32
    if small:
        grid = [(3, 96, bf16), (2, 64, f32)]
    else:
        grid = [(m, 576, bf16) for m in (1, 4, 16)] + [(m, 2048, bf16) for m in (1, 4, 16, 64, 256)]
        grid += [(4, 2048, f32)]
    for shape in grid:
        yield case(device, *shape)

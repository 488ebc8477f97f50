"""A fused projection split into heads and rotated: read once, written once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.harness import Case


def case(device: str, rows: int, heads: int, kv_heads: int, dim: int) -> Case:
    width = (heads + 2 * kv_heads) * dim
    angles = torch.arange(4096, device=device)[:, None] * 1e5 ** -torch.linspace(
        0, 1, dim // 2, device=device
    )
    table = torch.cat([angles.cos(), angles.sin()], -1)

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    def eager(qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.view(rows, -1, dim).split([heads, kv_heads, kv_heads], 1)
        cos, sin = table[positions][:, None].chunk(2, -1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def make() -> tuple:
        qkv = torch.randn(rows, width, device=device).bfloat16()
        return qkv, torch.randint(0, 4096, (rows,), device=device)

    return Case(
        shape=f"T={rows} heads={heads}/{kv_heads}x{dim}",
        dtype="bf16",
        make=make,
        ours=lambda ops, qkv, positions: ops.rope_qkv(qkv, positions, table, heads, kv_heads),
        read=rows * (2 * width + 4 * dim + 8),
        written=rows * 2 * width,
        peers={"eager": eager},
        check=lambda ours, peer: torch.testing.assert_close(ours, peer, rtol=0.02, atol=0.02),
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    grid = [(3, 6, 2, 64)] if small else [(1, 9, 3, 64), (8, 9, 3, 64), (64, 32, 8, 128)]
    for shape in grid:
        yield case(device, *shape)

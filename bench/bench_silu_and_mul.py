"""SwiGLU's activation."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case


def eager(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def case(device: str, rows: int, width: int) -> Case:
    return Case(
        shape=f"T={rows} F={width}",
        dtype="bf16",
        make=lambda: (torch.randn(rows, 2 * width, device=device).bfloat16(),),
        ours=lambda ops, gate_up: ops.silu_and_mul(gate_up),
        read=rows * width * 4,
        written=rows * width * 2,
        peers={"eager": eager},
        check=lambda ours, peer: torch.testing.assert_close(ours, peer, rtol=0.03, atol=0.03),
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    for shape in [(3, 96)] if small else [(1, 1536), (8, 1536), (64, 14336)]:
        yield case(device, *shape)

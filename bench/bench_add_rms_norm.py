"""The residual stream between layers: read and written once, in f32."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case


def eager(residual: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    residual += x
    return F.rms_norm(residual, weight.shape, weight.float(), 1e-6).to(weight.dtype)


def case(device: str, rows: int, h: int) -> Case:
    def make() -> tuple:
        x = torch.randn(rows, h, device=device).bfloat16()
        weight = (torch.rand(h, device=device) + 0.5).bfloat16()
        return torch.randn(rows, h, device=device), weight, x

    return Case(
        shape=f"T={rows} H={h}",
        dtype="bf16",
        make=make,
        ours=lambda ops, residual, weight, x: ops.add_rms_norm(residual, weight, x=x),
        read=rows * h * (4 + 2) + 2 * h,
        written=rows * h * (4 + 2),
        peers={"eager": eager},
        check=lambda ours, peer: torch.testing.assert_close(ours, peer, rtol=0.02, atol=0.02),
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    for shape in [(3, 96)] if small else [(1, 576), (8, 576), (64, 4096)]:
        yield case(device, *shape)

"""The trunk's projections for the few rows of a verification step: one read of the weights."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, random_values
from bench.report import dtype_name


def eager(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    return F.linear(x, weight) if scale is None else F.linear(x, weight.to(x.dtype)) * scale


def case(device: str, m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    x_dtype = torch.bfloat16 if dtype == torch.int8 else dtype

    def make() -> tuple:
        weight = random_values(n, k, dtype=dtype, device=device)
        scale = None
        if dtype == torch.int8:
            scale = torch.rand(n, device=device) / 40 + 0.01
        x = random_values(m, k, dtype=x_dtype, device=device, scale=k**-0.5)
        return x, weight, scale

    def check(ours: Tensor, peer: Tensor) -> None:
        torch.testing.assert_close(ours.float(), peer.float(), rtol=0.05, atol=0.05)

    return Case(
        shape=f"M={m} N={n} K={k}",
        dtype=dtype_name(dtype),
        make=make,
        ours=lambda ops, x, weight, scale: ops.skinny_linear(x, weight, weight_scale=scale),
        read=n * k * dtype.itemsize + m * k * x_dtype.itemsize + n * 4 * (dtype == torch.int8),
        written=m * n * x_dtype.itemsize,
        flops=2 * m * n * k,
        peers={"eager": eager},
        check=check,
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    bf16 = torch.bfloat16
    if small:
        grid = [(3, 64, 96, dtype) for dtype in (bf16, torch.float32, torch.int8)]
    else:
        # SmolLM2-135M's QKV, output, gate and up, and down projections; then an 8B model's.
        grid = [(4, 960, 576, bf16), (4, 576, 576, bf16)]
        grid += [(m, 3072, 576, bf16) for m in (1, 4, 8)] + [(4, 576, 1536, bf16)]
        grid += [(m, 4096, 4096, bf16) for m in (1, 4, 8, 16)]
        grid += [(4, 4096, 4096, torch.float32), (4, 4096, 4096, torch.int8)]
    for shape in grid:
        yield case(device, *shape)

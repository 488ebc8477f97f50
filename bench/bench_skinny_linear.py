"""The projections of a decoding step: the weights once, for a few rows."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, random_values
from bench.report import dtype_name


def make_inputs(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple:
    """x, our weight and scale, and the bf16 weight that a user would hold instead."""
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    dense = random_values(n, k, dtype=torch.bfloat16, device=device, scale=k**-0.5)
    if dtype == torch.bfloat16:
        return x, dense, None, dense
    scale = dense.abs().amax(1).float().clamp(min=1e-6) / 127
    return x, (dense.float() / scale[:, None]).round().to(dtype), scale, dense


def linear(x: Tensor, weight: Tensor, scale: Tensor | None, dense: Tensor) -> Tensor:
    return F.linear(x, dense)


def case(device: str, m: int, n: int, k: int, dtype: torch.dtype) -> Case:
    return Case(
        shape=f"M={m} {n}x{k}",
        dtype=dtype_name(dtype),
        make=lambda: make_inputs(m, n, k, dtype, device),
        ours=lambda ops, x, weight, scale, dense: ops.skinny_linear(x, weight, weight_scale=scale),
        read=n * k * dtype.itemsize + m * k * 2 + (n * 4 if dtype == torch.int8 else 0),
        written=m * n * 2,
        flops=2 * m * n * k,
        peers={"eager": linear},
        check=lambda mine, theirs: torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.15),
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    if small:
        yield case(device, 3, 130, 72, torch.bfloat16)
        yield case(device, 3, 130, 72, torch.int8)
        return
    # SmolLM2-135M: qkv, attention output, gate and up, down; and the MLP of a 7B model.
    for n, k in [(960, 576), (576, 576), (3072, 576), (576, 1536), (11008, 4096)]:
        for m in (1, 4, 16, 64) if device == "cuda" else (1, 2, 4, 8):
            yield case(device, m, n, k, torch.bfloat16)
    for m in (1, 4):
        yield case(device, m, 11008, 4096, torch.int8)


def counted() -> Iterator[Case]:
    for m in (1, 4, 16, 64):
        yield case("cpu", m, 128 * 265, 256, torch.bfloat16)

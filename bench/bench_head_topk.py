"""The LM head with its top-k and log-sum-exp: one read of the weights, and no logits stored."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, random_values
from bench.report import dtype_name

K = 16


def eager(hidden: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if scale is None:
        logits = F.linear(hidden, weight).float()
    else:
        logits = F.linear(hidden, weight.to(hidden.dtype)).float() * scale
    values, ids = logits.topk(K)
    return values, ids, logits.logsumexp(-1)


def case(device: str, m: int, vocabulary: int, h: int, dtype: torch.dtype) -> Case:
    hidden_dtype = torch.bfloat16

    def make() -> tuple:
        weight = random_values(vocabulary, h, dtype=dtype, device=device)
        scale = None
        if dtype == torch.int8:
            scale = torch.rand(vocabulary, device=device) / 40 + 0.01
        hidden = random_values(m, h, dtype=hidden_dtype, device=device, scale=h**-0.5)
        return hidden, weight, scale

    def check(ours: tuple, peer: tuple) -> None:
        for a, b in ((ours[0], peer[0]), (ours[2], peer[2])):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)

    return Case(
        shape=f"M={m} V={vocabulary} H={h} k={K}",
        dtype=dtype_name(dtype),
        make=make,
        ours=lambda ops, hidden, weight, scale: ops.head_topk(
            hidden, weight, K, weight_scale=scale
        ),
        read=vocabulary * h * dtype.itemsize
        + m * h * hidden_dtype.itemsize
        + vocabulary * 4 * (dtype == torch.int8),
        written=m * (K * (4 + 8) + 4),
        flops=2 * m * vocabulary * h,
        peers={"eager": eager},
        check=check,
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    bf16, int8 = torch.bfloat16, torch.int8
    if small:
        grid = [(3, 1000, 96, dtype) for dtype in (bf16, int8)]
    else:
        grid = [(m, 49152, 576, bf16) for m in (1, 4, 16)] + [(4, 49152, 576, int8)]
        grid += [(m, 151936, 2048, bf16) for m in (1, 16)] + [(4, 151936, 2048, int8)]
    for shape in grid:
        yield case(device, *shape)

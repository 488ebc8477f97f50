"""LM head with top-k and log-sum-exp: the weights once, logits never stored."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_skinny_linear import make_inputs
from bench.harness import Case
from bench.report import dtype_name

TOP_K = 8


def eager(hidden: Tensor, weight: Tensor, scale: Tensor | None, dense: Tensor) -> tuple:
    logits = F.linear(hidden, dense).float()
    values, ids = logits.topk(TOP_K)
    return values, ids, logits.logsumexp(-1)


def check(mine: tuple, theirs: tuple) -> None:
    torch.testing.assert_close(mine[0], theirs[0], rtol=0.05, atol=0.15)
    torch.testing.assert_close(mine[2], theirs[2], rtol=0.05, atol=0.15)


def case(device: str, m: int, v: int, h: int, dtype: torch.dtype) -> Case:
    return Case(
        shape=f"M={m} V={v} H={h} k={TOP_K}",
        dtype=dtype_name(dtype),
        make=lambda: make_inputs(m, v, h, dtype, device),
        ours=lambda ops, x, weight, scale, dense: ops.head_topk(
            x, weight, TOP_K, weight_scale=scale
        ),
        read=v * h * dtype.itemsize + m * h * 2 + (v * 4 if dtype == torch.int8 else 0),
        written=m * (TOP_K * 12 + 4),
        flops=2 * m * v * h,
        peers={"eager": eager},
        check=check,
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    if small:
        yield case(device, 3, 300, 72, torch.bfloat16)
        return
    # SmolLM2-135M, its reduced draft vocabulary, Qwen3-Next; on a GPU DeepSeek-V3 too.
    shapes = [(49152, 576, 16), (12288, 576, 4), (151936, 2048, 16)]
    rows = (1, 4, 8, 16)
    if device == "cuda":
        shapes = [(v, h, 256) for v, h in [(49152, 576), (151936, 2048), (129280, 7168)]]
        rows = (1, 4, 16, 64, 128, 256)
    for v, h, most in shapes:
        for m in rows:
            if m <= most:
                yield case(device, m, v, h, torch.bfloat16)
        for m in (1, 4):
            yield case(device, m, v, h, torch.int8)


def counted() -> Iterator[Case]:
    for m in (1, 4, 16, 64, 128):
        yield case("cpu", m, 49152, 256, torch.bfloat16)

"""The entrance of an MTP head: gather, two norms, concatenation and projection."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, random_values

VOCAB = 4096


def eager(
    ids: Tensor, hidden: Tensor, embedding: Tensor, weight: Tensor, enorm: Tensor, hnorm: Tensor
) -> Tensor:
    size = hidden.shape[-1:]
    e = F.rms_norm(F.embedding(ids, embedding), size, enorm, 1e-6)
    h = F.rms_norm(hidden, size, hnorm, 1e-6)
    return F.linear(torch.cat([e, h], -1), weight)


def case(device: str, t: int, h: int) -> Case:
    dtype = torch.bfloat16

    def make() -> tuple:
        return (
            torch.randint(0, VOCAB, (t,), device=device),
            torch.randn(t, h, device=device, dtype=dtype),
            random_values(VOCAB, h, dtype=dtype, device=device),
            random_values(h, 2 * h, dtype=dtype, device=device, scale=(2 * h) ** -0.5),
            torch.ones(h, device=device, dtype=dtype),
            torch.ones(h, device=device, dtype=dtype),
        )

    def ours(ops, ids, hidden, embedding, weight, enorm, hnorm):
        return ops.eh_proj(ids, hidden, embedding, weight, enorm_weight=enorm, hnorm_weight=hnorm)

    return Case(
        shape=f"T={t} H={h}",
        dtype="bf16",
        make=make,
        ours=ours,
        read=4 * h * h + 2 * t * h * 2 + 4 * h + 8 * t,
        written=t * h * 2,
        flops=4 * t * h * h,
        peers={"eager": eager},
        check=lambda mine, theirs: torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.15),
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    if small:
        yield case(device, 3, 64)
        return
    # SmolLM2-135M, Qwen3-Next, DeepSeek-V3.
    for h in (576, 2048, 7168):
        for t in (1, 4, 16, 64, 128, 256) if device == "cuda" else (1, 4, 16):
            yield case(device, t, h)


def counted() -> Iterator[Case]:
    for t in (1, 4, 16, 64, 128):
        yield case("cpu", t, 1024)

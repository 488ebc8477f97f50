"""Distillation of all depths, forward and backward, from a teacher's hidden states or its top m
log-probabilities, with the extra memory at its peak."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_linear_mtp_loss import SHIFT, check, gradients, logits_of
from bench.harness import Case, optional, random_values
from bench.report import dtype_name


def depths(hidden: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """The rows of each depth that have a teacher, and the teacher's rows."""
    rows = hidden.shape[1]
    for d, x in enumerate(hidden):
        yield x[: rows - d - SHIFT + 1], slice(d + SHIFT - 1, None)


def eager_hidden(hidden: Tensor, weight: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """The teacher's distribution is computed once for all depths."""
    with torch.no_grad():
        p = logits_of(teacher, weight).softmax(-1)
    losses = [
        F.kl_div(F.log_softmax(logits_of(x, weight), -1), p[rows], reduction="batchmean")
        for x, rows in depths(hidden)
    ]
    return gradients(sum(losses) / len(losses), hidden, weight)


def eager_pairs(
    hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor
) -> tuple[Tensor, ...]:
    """Only the teacher's m log-probabilities of the student are picked."""
    p = logprobs.exp()
    losses = []
    for x, rows in depths(hidden):
        log_q = F.log_softmax(logits_of(x, weight), -1).gather(-1, ids[rows])
        losses.append((p[rows] * (logprobs[rows] - log_q)).sum(-1).mean())
    return gradients(sum(losses) / len(losses), hidden, weight)


def liger(functional: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Its generalised JSD is the same divergence at beta 0; one call per depth."""

    def call(hidden: Tensor, weight: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        losses = [
            functional.liger_fused_linear_jsd(x, weight, teacher[rows], weight.detach(), None, 0.0)
            for x, rows in depths(hidden)
        ]
        return gradients(sum(losses) / len(losses), hidden, weight)

    return call


def case(device: str, k: int, t: int, v: int, h: int, dtype: torch.dtype, pairs: int = 0) -> Case:
    """`pairs` per row as the teacher, or its hidden states."""

    def make() -> tuple[Tensor, ...]:
        hidden = random_values(k, t, h, dtype=dtype, device=device)
        weight = random_values(v, h, dtype=dtype, device=device, scale=h**-0.5)
        teacher = torch.randn(t, h, device=device).to(dtype)
        learnt = hidden.requires_grad_(), weight.requires_grad_()
        if not pairs:
            return *learnt, teacher
        logprobs, ids = F.log_softmax(logits_of(teacher, weight.detach()), -1).topk(pairs)
        return *learnt, ids, logprobs.contiguous()

    def ours(ops: Any, hidden: Tensor, weight: Tensor, *teacher: Tensor) -> tuple[Tensor, ...]:
        names = ("teacher_ids", "teacher_logprobs") if pairs else ("teacher_hidden",)
        loss = ops.soft_mtp_loss(hidden, weight, **dict(zip(names, teacher)))[0]
        return gradients(loss, hidden, weight)

    rows = sum(max(0, t - d - SHIFT + 1) for d in range(k))
    inputs = (k * t * h + v * h) * dtype.itemsize
    peers: dict[str, Callable[..., Any] | None] = {"eager": eager_pairs if pairs else eager_hidden}
    if device == "cuda" and not pairs:
        peers["liger"] = optional("liger_kernel.transformers.functional", liger)
    return Case(
        shape=f"K={k} T={t} V={v} H={h} teacher={f'{pairs} pairs' if pairs else 'hidden'}",
        dtype=dtype_name(dtype),
        make=make,
        ours=ours,
        read=inputs + t * (pairs * 12 if pairs else h * dtype.itemsize),
        written=inputs,
        flops=2 * (3 * rows + (0 if pairs else t)) * h * v,
        peers=peers,
        memory=True,
        check=check,
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    if small:
        yield case(device, 2, 9, 60, 16, torch.float32)
        yield case(device, 2, 9, 60, 16, torch.float32, pairs=4)
        return
    # SmolLM2-135M.
    t = 512 if device == "cpu" else 2048
    yield case(device, 3, t, 49152, 576, torch.bfloat16)
    yield case(device, 3, t, 49152, 576, torch.bfloat16, pairs=64)
    if device == "cuda":
        yield case(device, 3, 8192, 151936, 2048, torch.bfloat16)  # Qwen3-Next

"""The training loss of all depths, forward and backward, with the extra memory at its peak."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, optional, random_values
from bench.report import dtype_name

SHIFT = 2
Inputs = tuple[Tensor, Tensor, Tensor]


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def per_depth(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., tuple]:
    """The mean over depths of a loss that takes the rows of one depth and their labels."""

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        depths, rows, _ = hidden.shape
        losses = [
            cross_entropy(hidden[d, : rows - d - SHIFT], weight, labels[d + SHIFT :])
            for d in range(depths)
        ]
        return gradients(sum(losses) / depths, hidden, weight)

    return call


def logits_of(hidden: Tensor, weight: Tensor) -> Tensor:
    on_cpu = hidden.device.type == "cpu"
    if on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # A processor without bf16 instructions takes several times as long as in f32.
        hidden, weight = hidden.float(), weight.float()
    return F.linear(hidden, weight).float()


def eager_depth(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(hidden, weight), labels)


eager = per_depth(eager_depth)


def ours(ops: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return gradients(ops.linear_mtp_loss(hidden, weight, labels)[0], hidden, weight)


def check(mine: tuple, theirs: tuple) -> None:
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())


def make(k: int, t: int, h: int, v: int, dtype: torch.dtype, device: str) -> Inputs:
    hidden = random_values(k, t, h, dtype=dtype, device=device)
    weight = random_values(v, h, dtype=dtype, device=device, scale=h**-0.5)
    labels = torch.randint(0, v, (t,), device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def case(device: str, k: int, t: int, v: int, h: int, dtype: torch.dtype) -> Case:
    rows = sum(max(0, t - d - SHIFT) for d in range(k))
    peers: dict[str, Callable[..., Any] | None] = {"eager": eager}
    if device == "cuda":
        peers["liger"] = optional(
            "liger_kernel.transformers.functional",
            lambda m: per_depth(m.liger_fused_linear_cross_entropy),
        )
        peers["cce"] = optional("cut_cross_entropy", lambda m: per_depth(m.linear_cross_entropy))
    inputs = (k * t * h + v * h) * dtype.itemsize
    return Case(
        shape=f"K={k} T={t} V={v} H={h}",
        dtype=dtype_name(dtype),
        make=lambda: make(k, t, h, v, dtype, device),
        ours=ours,
        read=inputs + t * 8,
        written=inputs,
        flops=3 * 2 * rows * h * v,
        peers=peers,
        memory=True,
        check=check,
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    if small:
        yield case(device, 2, 9, 60, 16, torch.float32)
        return
    # SmolLM2-135M, whole and with a reduced draft vocabulary.
    yield case(device, 3, 2048, 49152, 576, torch.bfloat16)
    yield case(device, 3, 2048, 12288, 576, torch.bfloat16)
    if device == "cpu":
        yield case(device, 3, 512, 12288, 576, torch.float32)
    else:
        yield case(device, 3, 8192, 151936, 2048, torch.bfloat16)  # Qwen3-Next

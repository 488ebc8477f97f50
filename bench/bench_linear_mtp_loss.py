"""The training loss of all depths, forward and backward, with the extra memory at its peak."""

import argparse
import ctypes
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, Ceilings, optional, random_values, run_case

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


def eager_depth(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    on_cpu = hidden.device.type == "cpu"
    if on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # A processor without bf16 instructions takes several times as long as in f32.
        hidden, weight = hidden.float(), weight.float()
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


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
        dtype="bf16" if dtype == torch.bfloat16 else "f32",
        make=lambda: make(k, t, h, v, dtype, device),
        ours=ours,
        read=inputs + t * 8,
        written=inputs,
        flops=3 * 2 * rows * h * v,
        peers=peers,
        compile=device == "cuda",
        check=check,
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    if small:
        yield case(device, 2, 9, 60, 16, torch.float32)
        return
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]
    # SmolLM2-135M, whole and with a reduced draft vocabulary.
    for v in (49152, 12288):
        for dtype in dtypes:
            yield case(device, 3, 2048, v, 576, dtype)
    if device == "cuda":
        yield case(device, 3, 8192, 151936, 2048, torch.bfloat16)  # Qwen3-Next


# ---- memory --------------------------------------------------------------------------------------


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name}")


def peak_bytes(device: str, call: Callable[..., Any], inputs: Inputs) -> int | None:
    """The most memory that a call holds beyond what is held before it, gradients included; None
    where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what is free already would be used without a trace
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
        before = _status_bytes("VmRSS")
        call(*inputs)
        return _status_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None


def rows(
    device: str, small: bool, ceilings: Ceilings, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    for one in cases(device, small):
        if options.only and not any(text in one.shape for text in options.only):
            continue
        calls = {"ours": lambda *inputs, one=one: one.ours(torch.ops.mtp, *inputs)}
        if options.peers:
            calls |= {name: call for name, call in one.peers.items() if call is not None}
        inputs = one.make()
        peaks = {name: peak_bytes(device, call, inputs) for name, call in calls.items()}
        del inputs
        row = run_case("linear_mtp_loss", one, ceilings, options)
        row["peak_bytes"] = peaks
        known = {name: peak for name, peak in peaks.items() if peak is not None}
        if known:
            texts = (f"{name} {peak / 2**20:.0f} MiB" for name, peak in known.items())
            row["notes"].append(f"peak memory: {', '.join(texts)}")
        yield row

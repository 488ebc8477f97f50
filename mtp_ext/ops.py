"""The public operators: typed wrappers of `torch.ops.mtp.*`.

Every function works on CPU and CUDA tensors, allocates its results, never synchronises with the
host and never reads device data on the host. A tensor of the wrong shape, dtype, device or stride
raises `RuntimeError` naming the argument, the expected and the actual value. `mtp_ext.reference`
holds the specification of each in plain PyTorch.
"""

import torch
from torch import Tensor

_ops = torch.ops.mtp


# ---- random numbers ------------------------------------------------------------------------------


def philox_uniform(seeds: Tensor, positions: Tensor, row: int, stream: int, n: int) -> Tensor:
    """The uniforms that the sampling operators use, strictly inside (0, 1).

    Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
    SC 2011) with key = seed and counter = (id / 4, stream << 16 | row, position): a value depends
    on its own seed, position, row, stream and id only, never on the batch.

    Args:
        seeds: int64 [B], one per request.
        positions: int64 [B], absolute position of the first token this step can emit.
        row: index of the token within the step, 0 <= row < 65536.
        stream: 0 draft, 1 accept, 2 final token; 0 <= stream < 65536.
        n: number of ids.

    Returns:
        f32 [B, n]: the uniforms of ids 0..n-1, multiples of 2^-23 plus 2^-24.
    """
    return _ops.philox_uniform(seeds, positions, row, stream, n)


# ---- between projections and attention -----------------------------------------------------------


def add_rms_norm(
    residual: Tensor,
    weight: Tensor,
    *,
    x: Tensor | None = None,
    eps: float = 1e-6,
    gemma_norm: bool = False,
) -> Tensor:
    """Adds a layer's output to the residual stream and normalises the sum for the next layer.

    A row's result does not depend on the other rows.

    Args:
        residual: f32 [T, H], updated in place: residual += x.
        weight: [H], f32, f16 or bf16; its dtype is the result's.
        x: [T, H] in weight's dtype; None adds nothing.
        eps: added to the mean square.
        gemma_norm: scale by 1 + weight.

    Returns:
        [T, H] in weight's dtype: residual / sqrt(mean(residual^2) + eps) * weight.
    """
    return _ops.add_rms_norm(residual, weight, x=x, eps=eps, gemma_norm=gemma_norm)


def rope_qkv(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the rows of a fused projection into q, k and v, and rotates q and k.

    Rotary embedding (Su et al. 2021, "RoFormer") in the halves layout: element i of a head turns
    together with element i + D/2. A row's result does not depend on the other rows.

    Args:
        qkv: [T, (Hq + 2 Hkv) D], f32, f16 or bf16: all heads of q, then of k, then of v.
        positions: int64 [T]; rows at a position outside the table are not rotated.
        cos_sin: f32 [P, D]: per position the cosines of its D/2 angles, then the sines.
        num_heads: Hq.
        num_kv_heads: Hkv.

    Returns:
        q [T, Hq, D], k [T, Hkv, D] and v [T, Hkv, D] in qkv's dtype.
    """
    return _ops.rope_qkv(qkv, positions, cos_sin, num_heads, num_kv_heads)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's activation (Shazeer 2020, "GLU variants improve transformer").

    Args:
        gate_up: [T, 2 F], f32, f16 or bf16: gate, then up.

    Returns:
        silu(gate) * up, [T, F] in gate_up's dtype.
    """
    return _ops.silu_and_mul(gate_up)

"""Fake kernels: output shapes and dtypes for `torch.compile` and `FakeTensorMode`.

They check what the real ones check of shapes and dtypes, so that a wrong call fails while it is
traced. Sizes may be symbolic: comparisons go through `torch._check`.
"""

import torch
from torch import Tensor


def _check_shape(op: str, name: str, t: Tensor | None, *dims: int | torch.SymInt | None) -> None:
    """Every dimension that is not None must match."""
    if t is None:
        return
    message = f"{op}: {name} must have shape {list(dims)}, got {list(t.shape)}"
    torch._check(t.dim() == len(dims), lambda: message)
    for size, expected in zip(t.shape, dims):
        if expected is not None:
            torch._check(size == expected, lambda: message)


def _check_dtype(op: str, name: str, t: Tensor | None, *allowed: torch.dtype) -> None:
    if t is None:
        return
    torch._check(
        t.dtype in allowed,
        lambda: f"{op}: {name} must have dtype {' or '.join(map(str, allowed))}, got {t.dtype}",
    )


# ---- random numbers ------------------------------------------------------------------------------


@torch.library.register_fake("mtp::philox_uniform")
def _philox_uniform(seeds, positions, row, stream, n):
    op = "philox_uniform"
    _check_dtype(op, "seeds", seeds, torch.int64)
    _check_shape(op, "seeds", seeds, None)
    _check_dtype(op, "positions", positions, torch.int64)
    _check_shape(op, "positions", positions, seeds.shape[0])
    return seeds.new_empty((seeds.shape[0], n), dtype=torch.float32)


# ---- between projections and attention -----------------------------------------------------------

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.register_fake("mtp::add_rms_norm")
def _add_rms_norm(residual, weight, *, x=None, eps=1e-6, gemma_norm=False):
    op = "add_rms_norm"
    _check_dtype(op, "residual", residual, torch.float32)
    _check_shape(op, "residual", residual, None, None)
    _check_dtype(op, "weight", weight, *_FLOATS)
    _check_shape(op, "weight", weight, residual.shape[1])
    _check_dtype(op, "x", x, weight.dtype)
    _check_shape(op, "x", x, *residual.shape)
    return weight.new_empty(residual.shape)


@torch.library.register_fake("mtp::rope_qkv")
def _rope_qkv(qkv, positions, cos_sin, num_heads, num_kv_heads):
    op = "rope_qkv"
    _check_dtype(op, "cos_sin", cos_sin, torch.float32)
    _check_shape(op, "cos_sin", cos_sin, None, None)
    rows, head_dim = qkv.shape[0], cos_sin.shape[1]
    _check_dtype(op, "qkv", qkv, *_FLOATS)
    _check_shape(op, "qkv", qkv, None, (num_heads + 2 * num_kv_heads) * head_dim)
    _check_dtype(op, "positions", positions, torch.int64)
    _check_shape(op, "positions", positions, rows)
    q = qkv.new_empty((rows, num_heads, head_dim))
    k = qkv.new_empty((rows, num_kv_heads, head_dim))
    return q, k, torch.empty_like(k)


@torch.library.register_fake("mtp::silu_and_mul")
def _silu_and_mul(gate_up):
    op = "silu_and_mul"
    _check_dtype(op, "gate_up", gate_up, *_FLOATS)
    _check_shape(op, "gate_up", gate_up, None, None)
    torch._check(gate_up.shape[1] % 2 == 0, lambda: f"{op}: gate_up's last dimension must be even")
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))

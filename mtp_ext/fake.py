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

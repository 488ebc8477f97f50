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

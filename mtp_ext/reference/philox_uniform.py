"""Philox4x32-10 in integer arithmetic on int64 tensors."""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MUL = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, by 16-bit halves so that int64 never overflows."""
    a_lo, a_hi = a & 0xFFFF, a >> 16
    low = a_lo * b
    middle = a_hi * b + (low >> 16)
    return middle >> 16, (middle << 16 | low & 0xFFFF) & MASK


def philox_words(seeds: Tensor, positions: Tensor, row: int, stream: int, ids: Tensor) -> Tensor:
    """The 32-bit word of each id, as int64. seeds, positions int64 [B]; ids [n] or [B, n]."""
    ids = ids.to(torch.int64).expand(seeds.shape[0], -1)
    column = torch.zeros_like(ids)
    key = [(seeds & MASK)[:, None] + column, (seeds >> 32 & MASK)[:, None] + column]
    counter = [
        ids >> 2,
        column + (stream << 16 | row),
        (positions & MASK)[:, None] + column,
        (positions >> 32 & MASK)[:, None] + column,
    ]
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(MUL[0], counter[0])
        hi1, lo1 = _mul_hi_lo(MUL[1], counter[2])
        counter = [hi1 ^ counter[1] ^ key[0], lo1, hi0 ^ counter[3] ^ key[1], lo0]
        key = [(k + w) & MASK for k, w in zip(key, WEYL)]
    return torch.stack(counter, -1).gather(-1, (ids & 3)[..., None])[..., 0]


def philox_uniform(seeds: Tensor, positions: Tensor, row: int, stream: int, n: int) -> Tensor:
    ids = torch.arange(n, device=seeds.device)
    words = philox_words(seeds, positions, row, stream, ids)
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23

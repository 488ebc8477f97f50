"""mma.sync and wgmma: operand layouts of the PTX ISA and their arithmetic.

A fragment register r of lane l holds e elements of 32/e bits. With g = l / 4 and t = l % 4:
A[g + 8 (r & 1), (r >> 1) 4e + t e + i], B[r 4e + t e + i, g], and C and D hold rows g and g + 8,
columns 2t and 2t + 1. One rule covers every m16n8 shape with 8 to 32-bit operands, and wgmma, of
whose 64 rows each warp holds 16, in blocks of 8 columns.

Products are exact, their sum with the accumulator is formed in f64 and rounded once. Hardware
truncates somewhere on the way, in a manner that is not documented.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import numerics as nx
from .numerics import F4, F8, I4, I8, U2, U4
from .parser import Instr, Vec


@dataclass(frozen=True)
class MmaPlan:
    m: int
    n: int
    k: int
    a_type: str
    b_type: str
    c_type: str
    d_type: str
    saturate: bool


def mma_plan(instr: Instr) -> MmaPlan | None:
    text = ".".join(instr.parts)
    match = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col(?:\.kind_f8f6f4)?(\.satfinite)?"
        r"\.(f16|f32|s32)\.(f16|bf16|tf32|s8|u8|e4m3|e5m2)\.(f16|bf16|tf32|s8|u8|e4m3|e5m2)"
        r"\.(f16|f32|s32)",
        text,
    )
    if not match:
        return None
    k, sat, d, a, b, c = match.groups()
    return MmaPlan(16, 8, int(k), a, b, c, d, bool(sat))


_WIDTH = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}


@lru_cache(None)
def _operand_index(which: str, rows: int, cols: int, e: int) -> np.ndarray:
    """For each matrix element, its position in [register, lane, element] order."""
    out = np.empty((rows, cols), np.int64)
    registers = rows * cols // (32 * e)
    for r in range(registers):
        for lane in range(32):
            g, t = lane >> 2, lane & 3
            for i in range(e):
                at = (r * 32 + lane) * e + i
                if which == "a":
                    out[g + 8 * (r & 1), (r >> 1) * 4 * e + t * e + i] = at
                elif which == "b":
                    out[r * 4 * e + t * e + i, g] = at
                elif e == 2:  # packed f16 accumulator
                    out[g + 8 * (r & 1), 8 * (r >> 1) + 2 * t + i] = at
                else:
                    out[g + 8 * (r >> 1 & 1), 8 * (r >> 2) + 2 * t + (r & 1)] = at
    return out.ravel()


@lru_cache(None)
def _inverse(which: str, rows: int, cols: int, e: int) -> np.ndarray:
    return np.argsort(_operand_index(which, rows, cols, e))


_CONVERT = {
    "f16": nx.f16_to_f32,
    "bf16": nx.bf16_to_f32,
    "tf32": lambda x: (x & U4.type(0xFFFFE000)).view(F4),
    "e4m3": nx.e4m3_to_f32,
    "e5m2": nx.e5m2_to_f32,
    "s8": lambda x: x.view(np.int8),
    "u8": lambda x: x,
}


def _matrix(regs: np.ndarray, t: str, which: str, rows: int, cols: int) -> np.ndarray:
    """[W, registers, 32] words to f64 [W, rows, cols]."""
    raw = regs.reshape(len(regs), -1).view(f"u{_WIDTH[t]}")
    picked = raw.take(_operand_index(which, rows, cols, 4 // _WIDTH[t]), 1)
    return _CONVERT[t](picked).astype(F8).reshape(len(regs), rows, cols)


def mma(plan: MmaPlan, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Operands as [W, registers, 32] words; returns D likewise."""
    m, n, k, warps = plan.m, plan.n, plan.k, len(a)
    product = np.matmul(
        _matrix(a, plan.a_type, "a", m, k), _matrix(b, plan.b_type, "b", k, n)
    ).reshape(warps, m * n)
    ec = 2 if plan.c_type == "f16" else 1
    words = c.reshape(warps, -1)
    index = _operand_index("c", m, n, ec)
    if plan.c_type == "s32":
        total = words.view(I4).take(index, 1).astype(I8) + product.astype(I8)
        if plan.saturate:
            total = np.clip(total, -(1 << 31), (1 << 31) - 1)
        out = total.astype(I4).view(U4)
    else:
        values = nx.f16_to_f32(words.view(U2)) if ec == 2 else words.view(F4)
        total = values.take(index, 1).astype(F8) + product
        out = total.astype(F4).view(U4) if plan.d_type == "f32" else nx.encode(total, "f16")
    ed = 2 if plan.d_type == "f16" else 1
    out = out.take(_inverse("c", m, n, ed), 1)
    return np.ascontiguousarray(out).view(U4).reshape(warps, -1, 32)


# --- wgmma: 16-bit operands -------------------------------------------------------------------


@dataclass(frozen=True)
class WgmmaPlan:
    n: int
    d_type: str
    in_type: str
    sign: int  # of the product
    a_outer: bool  # "transposed": k is the outer dimension in shared memory
    b_outer: bool
    d: tuple[int, ...]  # registers
    a: tuple[int, ...]  # those of A, if it is not in shared memory


def wgmma_plan(instr: Instr) -> WgmmaPlan | None:
    match = re.fullmatch(
        r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16"
        r"\.(?:(f32)\.(bf16)\.bf16|(f16|f32)\.(f16)\.f16)",
        ".".join(instr.parts),
    )
    if not match:
        return None
    d, a, _, _, *flags = instr.operands
    sign_a, sign_b, *outer = (flag.value for flag in flags)
    registers = tuple(r.index for r in a.items) if isinstance(a, Vec) else ()
    if registers:
        outer = [0, *outer]
    return WgmmaPlan(
        int(match[1]), match[2] or match[4], match[3] or match[5], sign_a * sign_b,
        bool(outer[0]), bool(outer[1]), tuple(r.index for r in d.items), registers,
    )  # fmt: skip


def wgmma_pieces(descriptor: np.ndarray, rows: int, outer: bool) -> np.ndarray:
    """Addresses of the 16-byte pieces of an operand of `rows` by 16 in shared memory.

    [descriptors, rows, 2], or [descriptors, 16, rows / 8] where k is the outer dimension. A
    descriptor holds start, leading and stride byte offset over 16, the base offset and the swizzle.
    Swizzled, pieces of 16 bytes of a row of `width` bytes change places by bits 7 and up of their
    address, counted from where the pattern of 8 rows begins: the base offset.
    """

    def field(shift: int, mask: int) -> np.ndarray:
        return (descriptor >> np.uint64(shift) & np.uint64(mask)).astype(I8)[:, None, None]

    start, leading, stride = (field(shift, 0x3FFF) << 4 for shift in (0, 16, 32))
    base, mode = field(49, 7), field(62, 3)
    width = np.array([16, 128, 64, 32])[mode]
    if outer:
        k, piece = np.arange(16)[:, None], np.arange(rows // 8)
        across, down = np.where(mode == 0, stride, leading), np.where(mode == 0, leading, stride)
        per = width // 16
        linear = piece % per * 16 + piece // per * across + k % 8 * width + k // 8 * down
    else:
        row, piece = np.arange(rows)[:, None], np.arange(2)
        linear = row % 8 * width + row // 8 * stride + piece * np.where(mode == 0, leading, 16)
    linear = start + linear
    return linear ^ (((linear >> 7) - base & width // 16 - 1) << 4)


def wgmma_operand(words: np.ndarray, t: str, outer: bool) -> np.ndarray:
    """[n, ..., 2] 64-bit words of the pieces to f64 [n, rows, 16]."""
    values = _CONVERT[t](words.view(U2).reshape(*words.shape[:2], -1)).astype(F8)
    return values.swapaxes(1, 2) if outer else values


def wgmma_fragment(a: np.ndarray, t: str) -> np.ndarray:
    """[W, 4, 32] words to f64 [W / 4, 64, 16]."""
    return _matrix(a, t, "a", 16, 16).reshape(-1, 64, 16)


def wgmma(
    plan: WgmmaPlan, a: np.ndarray, b: np.ndarray, d: np.ndarray, keep: np.ndarray
) -> np.ndarray:
    """a [n, 64, 16] and b [n, N, 16]; d and the result as words [4 n, registers, 32].

    `keep` [n]: whether d is added.
    """
    product = plan.sign * np.matmul(a, b.swapaxes(1, 2)).reshape(len(d), -1)
    e = 2 if plan.d_type == "f16" else 1
    words = d.reshape(len(d), -1)
    values = nx.f16_to_f32(words.view(U2)) if e == 2 else words.view(F4)
    old = values.take(_operand_index("c", 16, plan.n, e), 1).astype(F8)
    total = np.where(np.repeat(keep, 4)[:, None], old + product, product)
    out = nx.encode(total, "f16") if e == 2 else total.astype(F4).view(U4)
    out = out.take(_inverse("c", 16, plan.n, e), 1)
    return np.ascontiguousarray(out).view(U4).reshape(d.shape)

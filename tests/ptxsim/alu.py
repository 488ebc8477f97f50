"""The table of instruction semantics for everything that maps registers to registers.

`semantics(instr)` returns a function on NumPy arrays with the kinds of its operands and result. A
kind is a NumPy type code, "b1" for predicates; f16, bf16 and packed values travel as unsigned
bits. All functions return fresh arrays: the engine writes into results in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import numerics as nx
from .numerics import F4, F8, I4, I8, U2, U4, U8
from .parser import Instr, Reg, type_size


class Sem(NamedTuple):
    fn: Callable
    ins: tuple[str, ...]
    out: str | tuple[str, ...]
    klass: str  # instruction class in reports


TABLE: dict[str, Callable[[tuple[str, ...], Instr], Sem | None]] = {}


def op(*names: str) -> Callable:
    def add(builder: Callable) -> Callable:
        for name in names:
            TABLE[name] = builder
        return builder

    return add


def semantics(instr: Instr) -> Sem | None:
    """The semantics of an instruction, or None where it is not in the table."""
    builder = TABLE.get(instr.op)
    return builder(instr.parts[1:], instr) if builder else None


def kind(t: str) -> str:
    """NumPy kind that holds PTX type `t`: integers by signedness, f32/f64, the rest as bits."""
    if t == "pred":
        return "b1"
    if t in ("f32", "f64"):
        return "f4" if t == "f32" else "f8"
    return ("i" if t[0] == "s" else "u") + str(type_size(t))


def unsigned(k: str) -> str:
    return "u" + k[1]


def _const(value: int, k: str) -> np.ndarray:
    bits = 8 * int(k[1])
    return np.array([value & ((1 << bits) - 1)], "u" + k[1]).view(k)


def is_int(t: str) -> bool:
    return t[0] in "usb" and t[:2] != "bf"


# --- integers ------------------------------------------------------------------------------


def _shift(fn: Callable, bits: int, fill: Callable) -> Callable:
    top = np.array([bits - 1], U4)

    def shift(a: np.ndarray, n: np.ndarray) -> np.ndarray:
        if n.size == 1 and n[0] < bits:
            return fn(a, n.astype(a.dtype))
        out = fn(a, np.minimum(n, top).astype(a.dtype))
        return np.where(n > top, fill(a), out)

    return shift


@op("shl", "shr")
def _shl_shr(p, instr):
    k = kind(p[-1])
    bits = 8 * int(k[1])
    if instr.op == "shl":
        return Sem(_shift(np.left_shift, bits, np.zeros_like), (k, "u4"), k, "int")
    if k[0] == "i":
        return Sem(
            _shift(np.right_shift, bits, lambda a: a >> a.dtype.type(bits - 1)), (k, "u4"), k, "int"
        )
    return Sem(_shift(np.right_shift, bits, np.zeros_like), (k, "u4"), k, "int")


def _mul_hi(k: str) -> Callable:
    bits = 8 * int(k[1])
    if bits < 64:
        wide = k[0] + str(int(k[1]) * 2)
        s = _const(bits, wide)
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> s).astype(k)
    s32, m32 = np.uint64(32), np.uint64(0xFFFFFFFF)

    def umulhi(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        al, ah, bl, bh = a & m32, a >> s32, b & m32, b >> s32
        mid = ah * bl + ((al * bl) >> s32)
        mid2 = al * bh + (mid & m32)
        return ah * bh + (mid >> s32) + (mid2 >> s32)

    if k[0] == "u":
        return umulhi

    def smulhi(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        ua, ub = a.view(U8), b.view(U8)
        zero = U8.type(0)
        return (umulhi(ua, ub) - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)).view(I8)

    return smulhi


def _divide(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    # C truncates, NumPy floors; division by zero gives all ones as on hardware.
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "i":
        overflow = safe == -1
        safe = np.where(overflow, b.dtype.type(1), safe)
        out = np.fmod(a, safe) if remainder else ((a - np.fmod(a, safe)) // safe)
        out = np.where(overflow, np.zeros_like(a) if remainder else -a, out)
    else:
        out = a % safe if remainder else a // safe
    return np.where(zero, a if remainder else ~np.zeros_like(out), out)


def _int_mul(p: tuple[str, ...]) -> tuple[Callable, str, str]:
    k = kind(p[-1])
    if "wide" in p:
        wide = k[0] + str(int(k[1]) * 2)
        return (lambda a, b: np.multiply(a, b, dtype=wide)), k, wide
    if "hi" in p:
        return _mul_hi(k), k, k
    return np.multiply, k, k


def _mul24(p):
    k = kind(p[-1])

    def low24(x: np.ndarray) -> np.ndarray:
        return (x << x.dtype.type(8)) >> x.dtype.type(8)

    if "hi" in p:
        wide = k[0] + "8"
        return lambda a, b: (
            (low24(a).astype(wide) * low24(b).astype(wide)) >> _const(16, wide)
        ).astype(k)
    return lambda a, b: low24(a) * low24(b)


@op("mul24", "mad24")
def _m24(p, instr):
    k, mul = kind(p[-1]), _mul24(p)
    if instr.op == "mul24":
        return Sem(mul, (k, k), k, "int")
    return Sem(lambda a, b, c: mul(a, b) + c, (k, k, k), k, "int")


def _saturating(fn: Callable) -> Callable:
    info = np.iinfo("i4")

    def f(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.clip(fn(a.astype(I8), b.astype(I8)), info.min, info.max).astype(I4)

    return f


# --- packed and 16-bit floats --------------------------------------------------------------


def _halves(fn: Callable, load: Callable, store: Callable) -> Callable:
    """fn on f32 values of 16-bit operands."""
    return lambda *xs: store(fn(*(load(x) for x in xs)))


def _packed(fn: Callable) -> Callable:
    """A 16-bit function applied to both halves of 32-bit operands."""
    s16, m16 = np.uint32(16), np.uint32(0xFFFF)

    def f(*xs: np.ndarray) -> np.ndarray:
        low = fn(*((x & m16).astype(U2) for x in xs))
        high = fn(*((x >> s16).astype(U2) for x in xs))
        return low.astype(U4) | (high.astype(U4) << s16)

    return f


_LOAD = {"f16": nx.f16_to_f32, "bf16": nx.bf16_to_f32}
_STORE = {"f16": nx.f32_to_f16, "bf16": nx.f32_to_bf16}


def _small(t: str, fn: Callable) -> tuple[Callable, str]:
    """Lifts an f32 function to f16, bf16 or a packed pair of them."""
    base = t.removesuffix("x2")
    f = _halves(fn, _LOAD[base], _STORE[base])
    return (_packed(f), "u4") if t.endswith("x2") else (f, "u2")


def _small_fma(t: str, relu: bool, sat: bool) -> Callable:
    base = t.removesuffix("x2")
    load = _LOAD[base]

    def f(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        exact = nx.fma_odd(load(a).astype(F8), load(b).astype(F8), load(c).astype(F8))
        if relu:
            exact = np.where(exact < 0, 0.0, exact)
        if sat:
            exact = np.clip(np.where(np.isnan(exact), 0.0, exact), 0.0, 1.0)
        return nx.encode(nx.round_to_format(exact, base, "rn"), base)

    return _packed(f) if t.endswith("x2") else f


# --- add, sub, mul, mad, fma ---------------------------------------------------------------


def _float_mods(fn: Callable, p: tuple[str, ...]) -> Callable:
    """Wraps .ftz and .sat around an f32 function."""
    ftz, sat = "ftz" in p, "sat" in p
    if not (ftz or sat):
        return fn

    def f(*xs: np.ndarray) -> np.ndarray:
        if ftz:
            xs = tuple(nx.flush(x) for x in xs)
        out = fn(*xs)
        if ftz:
            out = nx.flush(out)
        if sat:
            out = np.where(np.isnan(out), out.dtype.type(0), np.clip(out, 0, 1)).astype(out.dtype)
        return out

    return f


def _mode(p: tuple[str, ...]) -> str:
    return next((m for m in ("rz", "rm", "rp") if m in p), "rn")


@op("add", "sub", "mul")
def _arith(p, instr):
    t, name = p[-1], instr.op
    ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    if is_int(t):
        k = kind(t)
        if name == "mul":
            fn, k, out = _int_mul(p)
            return Sem(fn, (k, k), out, "int")
        if "cc" in p:
            return _carry(p, instr)
        if "sat" in p:
            return Sem(_saturating(ufunc), (k, k), k, "int")
        return Sem(ufunc, (k, k), k, "int")
    mode = _mode(p)
    if t in ("f32", "f64"):
        k = kind(t)
        fn = ufunc
        if mode != "rn":
            if t == "f64":
                return None
            if name == "mul":
                fn = lambda a, b: nx.f64_to_f32(a.astype(F8) * b.astype(F8), mode)  # noqa: E731
            elif name == "add":
                fn = lambda a, b: nx.add_directed(a, b, mode)  # noqa: E731
            else:
                fn = lambda a, b: nx.add_directed(a, -b, mode)  # noqa: E731
        return Sem(_float_mods(fn, p), (k, k), k, "fp32" if t == "f32" else "fp64")
    if t == "f32x2":
        return Sem(_pair32(ufunc), ("u8", "u8"), "u8", "fp32")
    fn, k = _small(t, _float_mods(ufunc, p))
    return Sem(fn, (k, k), k, "fp16")


def _pair32(fn: Callable) -> Callable:
    def f(*xs: np.ndarray) -> np.ndarray:
        low = fn(*((x & np.uint64(0xFFFFFFFF)).astype(U4).view(F4) for x in xs))
        high = fn(*((x >> np.uint64(32)).astype(U4).view(F4) for x in xs))
        return low.view(U4).astype(U8) | (high.view(U4).astype(U8) << np.uint64(32))

    return f


@op("fma", "mad")
def _fma(p, instr):
    t = p[-1]
    if is_int(t):
        if "cc" in p:
            return _carry(p, instr)
        fn, k, out = _int_mul(p)
        if "sat" in p:
            add = _saturating(np.add)
            return Sem(lambda a, b, c: add(fn(a, b), c), (k, k, out), out, "int")
        return Sem(lambda a, b, c: fn(a, b) + c, (k, k, out), out, "int")
    mode = _mode(p)
    if t == "f32":
        fn = nx.fma32 if mode == "rn" else lambda a, b, c: nx.fma32_directed(a, b, c, mode)
        return Sem(_float_mods(fn, p), ("f4",) * 3, "f4", "fp32")
    if t == "f32x2":
        return Sem(_pair32(nx.fma32), ("u8",) * 3, "u8", "fp32")
    if t == "f64":
        return Sem(nx.fma64, ("f8",) * 3, "f8", "fp64") if mode == "rn" else None
    k = "u4" if t.endswith("x2") else "u2"
    return Sem(_small_fma(t, "relu" in p, "sat" in p), (k,) * 3, k, "fp16")


@op("addc", "subc", "madc")
def _carry(p, instr):
    """Extended-precision arithmetic; the carry flag is one more operand and result."""
    name, k = instr.op, unsigned(kind(p[-1]))
    carry_in, carry_out = name.endswith("c"), "cc" in p
    bits = 8 * int(k[1])

    def add(a, b, c):
        s = a + b
        over = s < a
        if carry_in:
            s2 = s + c.astype(k)
            over = over | (s2 < s)
            s = s2
        return s, over

    def sub(a, b, c):
        s = a - b
        under = a < b
        if carry_in:
            s2 = s - c.astype(k)
            under = under | (s2 > s)
            s = s2
        return s, under

    if name.startswith("mad"):
        mul = _mul_hi(kind(p[-1])) if "hi" in p else np.multiply
        kk = kind(p[-1])

        def fn(a, b, c, flag):
            return add(mul(a.view(kk), b.view(kk)).view(k), c, flag)

        ins = (k, k, k, "b1")
    else:
        fn, ins = (add if name.startswith("add") else sub), (k, k, "b1")
    del bits
    if carry_out:
        return Sem(fn, ins, (k, "b1"), "int")
    return Sem(lambda *xs: fn(*xs)[0], ins, k, "int")


@op("div")
def _div(p, instr):
    t = p[-1]
    k = kind(t)
    if is_int(t):
        return Sem(lambda a, b: _divide(a, b, False), (k, k), k, "int")
    if _mode(p) != "rn":
        return None
    return Sem(_float_mods(np.divide, p), (k, k), k, "fp32" if t == "f32" else "fp64")


@op("rem")
def _rem(p, instr):
    k = kind(p[-1])
    return Sem(lambda a, b: _divide(a, b, True), (k, k), k, "int")


def _via_f64(fn: Callable) -> Callable:
    return lambda x: fn(x.astype(F8)).astype(F4)


def _rsqrt(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, np.copysign(np.inf, x), 1.0 / np.sqrt(x))


_UNARY = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": _rsqrt,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@op(*_UNARY)
def _unary(p, instr):
    t, fn = p[-1], _UNARY[instr.op]
    if t == "f64":
        return Sem(fn, ("f8",), "f8", "fp64")
    mode = _mode(p)
    if mode != "rn":
        if instr.op not in ("rcp", "sqrt"):
            return None
        # f64 is far from a tie for the quotient and root of f32, so rounding it down is exact
        # except where the f64 result itself is exact, and then it is right too.
        f = lambda x: nx.f64_to_f32(fn(x.astype(F8)), mode)  # noqa: E731
        return Sem(_float_mods(f, p), ("f4",), "f4", "mufu")
    f = _via_f64(fn)
    if t == "f32":
        return Sem(_float_mods(f, p), ("f4",), "f4", "mufu")
    small, k = _small(t, f)
    return Sem(small, (k,), k, "mufu")


@op("neg", "abs")
def _neg_abs(p, instr):
    t = p[-1]
    k = kind(t)
    if is_int(t):
        return Sem(np.negative if instr.op == "neg" else np.abs, (k,), k, "int")
    width = type_size(t)
    one = 1 << (8 * width - 1)
    if t.endswith("x2"):
        one |= one >> 16
    u = f"u{width}"
    sign = _const(one, u)
    if instr.op == "neg":
        fn = lambda x: x ^ sign  # noqa: E731
    else:
        fn = lambda x: x & ~sign  # noqa: E731
    if "ftz" in p and t == "f32":
        return Sem(lambda x: nx.flush(fn(x).view(F4)).view(U4), (u,), u, "fp32")
    return Sem(fn, (u,), u, "fp32" if t == "f32" else "fp16" if "16" in t else "fp64")


@op("min", "max")
def _min_max(p, instr):
    t, name = p[-1], instr.op
    k = kind(t)
    if "x2" in t and t[0] in "us":
        half = t[0].replace("s", "i") + "2"
        fn = np.minimum if name == "min" else np.maximum
        relu = "relu" in p

        def f16(a, b):
            out = fn(a.view(half), b.view(half))
            return (np.maximum(out, 0) if relu else out).astype(half).view(U2)

        return Sem(_packed(f16), ("u4", "u4"), "u4", "int")
    if is_int(t):
        fn = np.minimum if name == "min" else np.maximum
        if "relu" in p:
            return Sem(lambda a, b: np.maximum(fn(a, b), a.dtype.type(0)), (k, k), k, "int")
        return Sem(fn, (k, k), k, "int")
    base = nx.fmin if name == "min" else nx.fmax
    nan, xor = "NaN" in p, "xorsign" in p

    def fn(*xs):
        a, b = xs[0], xs[1]
        if xor:
            sign = np.signbit(a) ^ np.signbit(b)
            out = base(np.abs(a), np.abs(b), nan)
            return np.where(sign, -out, out)
        out = base(a, b, nan)
        for c in xs[2:]:
            out = base(out, c, nan)
        if np.isnan(out).any():
            canonical = np.array([0x7FFFFFFF], U4).view(F4) if out.dtype == F4 else F8.type(np.nan)
            out = np.where(np.isnan(out), canonical, out)
        return out

    count = len(instr.operands) - 1
    if t in ("f32", "f64"):
        return Sem(_float_mods(fn, p), (k,) * count, k, "fp32" if t == "f32" else "fp64")
    fn, k = _small(t, fn)
    return Sem(fn, (k,) * count, k, "fp16")


@op("copysign")
def _copysign(p, instr):
    k = kind(p[-1])
    # The sign comes from the first operand.
    return Sem(lambda a, b: np.copysign(b, a), (k, k), k, "fp32")


@op("testp")
def _testp(p, instr):
    test, k = p[0], kind(p[-1])
    tiny = np.finfo(k).tiny
    fn = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }[test]
    return Sem(fn, (k,), "b1", "fp32")


# --- bits ----------------------------------------------------------------------------------


@op("and", "or", "xor", "not", "cnot")
def _logic(p, instr):
    k = "b1" if p[-1] == "pred" else unsigned(kind(p[-1]))
    if instr.op == "not":
        return Sem(np.logical_not if k == "b1" else np.invert, (k,), k, "int")
    if instr.op == "cnot":
        return Sem(lambda a: (a == 0).astype(a.dtype), (k,), k, "int")
    fn = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[instr.op]
    return Sem(fn, (k, k), k, "int")


@op("lop3")
def _lop3(p, instr):
    table = instr.operands[4].value
    ands = [(bool(i & 4), bool(i & 2), bool(i & 1)) for i in range(8) if table >> i & 1]
    simple = {
        0x96: lambda a, b, c: a ^ b ^ c,
        0xFE: lambda a, b, c: a | b | c,
        0x80: lambda a, b, c: a & b & c,
        0xEA: lambda a, b, c: (a & b) | c,
        0xF8: lambda a, b, c: a | (b & c),
        0xCA: lambda a, b, c: (a & b) | (~a & c),
        0xE8: lambda a, b, c: (a & b) | (a & c) | (b & c),
        0x6A: lambda a, b, c: (a & b) ^ c,
        0x78: lambda a, b, c: a ^ (b & c),
    }.get(table)

    def general(a, b, c):
        out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), U4)
        for ta, tb, tc in ands:
            out |= (a if ta else ~a) & (b if tb else ~b) & (c if tc else ~c)
        return out

    fn = simple or general
    if "BOOL" in " ".join(p):
        return None
    return Sem(fn, ("u4",) * 3, "u4", "int")


@op("popc")
def _popc(p, instr):
    k = unsigned(kind(p[-1]))
    return Sem(lambda a: np.bitwise_count(a).astype(U4), (k,), "u4", "int")


def _find_msb(a: np.ndarray) -> np.ndarray:
    """Index of the highest set bit, -1 for zero; exact for 64 bits."""
    high = (a >> a.dtype.type(a.dtype.itemsize * 4)).astype(F8)
    low = (a & a.dtype.type((1 << (a.dtype.itemsize * 4)) - 1)).astype(F8)
    half = a.dtype.itemsize * 4
    from_high = np.frexp(high)[1] - 1 + half
    return np.where(high > 0, from_high, np.frexp(low)[1] - 1).astype(I4)


@op("clz")
def _clz(p, instr):
    k = unsigned(kind(p[-1]))
    bits = 8 * int(k[1])
    return Sem(lambda a: (bits - 1 - _find_msb(a)).astype(U4), (k,), "u4", "int")


@op("bfind")
def _bfind(p, instr):
    k = kind(p[-1])
    bits, amount = 8 * int(k[1]), "shiftamt" in p

    def fn(a: np.ndarray) -> np.ndarray:
        if k[0] == "i":
            a = np.where(a < 0, ~a, a).view(unsigned(k))
        pos = _find_msb(a)
        if amount:
            pos = np.where(pos >= 0, bits - 1 - pos, pos).astype(I4)
        return pos.view(U4)

    return Sem(fn, (k,), "u4", "int")


@op("brev")
def _brev(p, instr):
    k = unsigned(kind(p[-1]))
    bits = 8 * int(k[1])

    def fn(a: np.ndarray) -> np.ndarray:
        shift, mask = bits >> 1, (1 << bits) - 1
        m = mask
        while shift:
            m ^= (m << shift) & mask
            mm, s = a.dtype.type(m), a.dtype.type(shift)
            a = ((a >> s) & mm) | ((a & mm) << s)
            shift >>= 1
        return a

    return Sem(fn, (k,), k, "int")


@op("bfe")
def _bfe(p, instr):
    k = kind(p[-1])
    bits, u = 8 * int(k[1]), np.dtype(unsigned(k))

    def fn(a, pos, length):
        pos, length = np.minimum(pos & U4.type(255), bits), np.minimum(length & U4.type(255), bits)
        asked, at = length, np.minimum(pos + length - U4.type(1), bits - 1)  # at: the sign bit
        if k[0] == "i":
            length = np.minimum(length, bits - pos)
        au = a.view(u)
        shifted = np.where(pos < bits, au >> np.minimum(pos, bits - 1).astype(u), u.type(0))
        mask = np.where(
            length < bits,
            (u.type(1) << np.minimum(length, bits - 1).astype(u)) - u.type(1),
            ~u.type(0),
        )
        out = shifted & mask
        if k[0] == "i":
            sign = ((au >> at.astype(u)) & u.type(1)).astype(bool) & (asked > 0)
            out = np.where(sign, out | ~mask, out)
        return out.astype(u).view(k)

    return Sem(fn, (k, "u4", "u4"), k, "int")


@op("bfi")
def _bfi(p, instr):
    k = unsigned(kind(p[-1]))
    bits, u = 8 * int(k[1]), np.dtype(k)

    def fn(a, b, pos, length):
        pos, length = np.minimum(pos & U4.type(255), bits), np.minimum(length & U4.type(255), bits)
        mask = np.where(
            length < bits,
            (u.type(1) << np.minimum(length, bits - 1).astype(u)) - u.type(1),
            ~u.type(0),
        )
        s = np.minimum(pos, bits - 1).astype(u)
        mask = np.where(pos < bits, mask << s, u.type(0)).astype(u)
        return (b & ~mask) | ((a << s) & mask)

    return Sem(fn, (k, k, "u4", "u4"), k, "int")


@op("bmsk")
def _bmsk(p, instr):
    clamp = "clamp" in p

    def fn(a, b):
        if not clamp:
            a, b = a & U4.type(31), b & U4.type(31)
        wide_a, wide_b = np.minimum(a, 63).astype(U8), np.minimum(b, 32).astype(U8)
        return ((((U8.type(1) << wide_b) - U8.type(1)) << wide_a) & U8.type(0xFFFFFFFF)).astype(U4)

    return Sem(fn, ("u4", "u4"), "u4", "int")


@op("prmt")
def _prmt(p, instr):
    mode = p[1] if len(p) > 1 else ""
    selector = instr.operands[3]

    def pick(table: np.ndarray, sel: np.ndarray) -> np.ndarray:
        byte = (table >> ((sel & U8.type(7)) << U8.type(3))) & U8.type(255)
        sign = (byte >> U8.type(7)) * U8.type(255)
        return np.where((sel & U8.type(8)) != 0, sign, byte)

    def fn(a, b, c):
        table = a.astype(U8) | (b.astype(U8) << U8.type(32))
        c = c.astype(U8)
        if mode:
            n = c & U8.type(3)
            order = {
                "f4e": lambda i: n + U8.type(i),
                "b4e": lambda i: (n - U8.type(i)) & U8.type(7),
                "rc8": lambda i: n,
                "ecl": lambda i: np.maximum(n, U8.type(i)),
                "ecr": lambda i: np.minimum(n, U8.type(i)),
                "rc16": lambda i: (n & U8.type(1)) * U8.type(2) + U8.type(i & 1),
            }[mode]
            parts = [pick(table, order(i)) for i in range(4)]
        else:
            parts = [pick(table, (c >> U8.type(4 * i)) & U8.type(15)) for i in range(4)]
        out = parts[0]
        for i in range(1, 4):
            out = out | (parts[i] << U8.type(8 * i))
        return out.astype(U4)

    if not mode and not isinstance(selector, Reg) and not selector.value & 0x8888:
        # The usual case, a constant permutation: shifts and masks of 32-bit words.
        picks = [(selector.value >> (4 * i)) & 7 for i in range(4)]

        def fast(a, b, c):
            out = None
            for i, s in enumerate(picks):
                src, at = (a, s) if s < 4 else (b, s - 4)
                byte = src & U4.type(0xFF << (8 * at))
                if i > at:
                    byte = byte << U4.type(8 * (i - at))
                elif i < at:
                    byte = byte >> U4.type(8 * (at - i))
                out = byte if out is None else out | byte
            return out

        return Sem(fast, ("u4",) * 3, "u4", "int")
    return Sem(fn, ("u4",) * 3, "u4", "int")


@op("shf")
def _shf(p, instr):
    left, wrap = "l" in p, "wrap" in p

    def fn(a, b, c):
        n = (c & U4.type(31)) if wrap else np.minimum(c, U4.type(32))
        n = n.astype(U8)
        wide = a.astype(U8) | (b.astype(U8) << U8.type(32))
        if left:
            return ((wide << n) >> U8.type(32)).astype(U4)
        return (wide >> n).astype(U4)

    return Sem(fn, ("u4",) * 3, "u4", "int")


@op("sad")
def _sad(p, instr):
    k = kind(p[-1])
    return Sem(lambda a, b, c: c + np.where(a < b, b - a, a - b), (k,) * 3, k, "int")


@op("dp4a", "dp2a")
def _dp(p, instr):
    ta, tb = p[-2], p[-1]
    out = "i4" if "s" in ta[0] + tb[0] else "u4"

    def lanes(x: np.ndarray, t: str, width: int, first: int, count: int) -> list[np.ndarray]:
        dtype = ("i" if t[0] == "s" else "u") + str(width)
        shift = 8 * width
        return [
            (x >> U4.type(shift * (first + i))).astype(f"u{width}").view(dtype).astype(I8)
            for i in range(count)
        ]

    def fn(a, b, c):
        if instr.op == "dp4a":
            pairs = zip(lanes(a, ta, 1, 0, 4), lanes(b, tb, 1, 0, 4))
        else:
            pairs = zip(lanes(a, ta, 2, 0, 2), lanes(b, tb, 1, 2 if "hi" in p else 0, 2))
        total = c.astype(I8)
        for x, y in pairs:
            total = total + x * y
        return total.astype(U4).view(out)

    return Sem(fn, ("u4", "u4", out), out, "int")


# --- compare and select --------------------------------------------------------------------

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(cmp: str, floating: bool) -> Callable:
    if not floating:
        return _COMPARE[cmp]
    if cmp == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if cmp == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if cmp == "ne":  # ordered: false on NaN, unlike NumPy's
        return lambda a, b: (a < b) | (a > b)
    if cmp in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
        f = _COMPARE[cmp[:2]]
        return lambda a, b: f(a, b) | np.isnan(a) | np.isnan(b)
    return _COMPARE[cmp]


def _compare_kind(p: tuple[str, ...], t: str) -> tuple[Callable, str]:
    """The comparison of setp/set and the kind of its operands."""
    cmps = set(_COMPARE) | {"equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"}
    cmp = next(x for x in p if x in cmps)
    floating = not is_int(t)
    fn = _comparison(cmp, floating)
    k = kind(t)
    if t in ("f16", "bf16"):
        load, base = _LOAD[t], fn
        fn = lambda a, b: base(load(a), load(b))  # noqa: E731
    elif t == "f32" and "ftz" in p:
        base32 = fn
        fn = lambda a, b: base32(nx.flush(a), nx.flush(b))  # noqa: E731
    return fn, k


_BOOL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@op("setp")
def _setp(p, instr):
    t = p[-1]
    combine = next((_BOOL[x] for x in p if x in _BOOL), None)
    pair = type(instr.operands[0]).__name__ == "Pair"
    if t.endswith("x2"):
        fn, _ = _compare_kind(p, t[:-2])
        s16, m16 = np.uint32(16), np.uint32(0xFFFF)

        def packed(a, b, *c):
            low = fn((a & m16).astype(U2), (b & m16).astype(U2))
            high = fn((a >> s16).astype(U2), (b >> s16).astype(U2))
            if c:
                low, high = combine(low, c[0]), combine(high, c[0])
            return low, high

        ins = ("u4", "u4") + (("b1",) if combine else ())
        return Sem(packed, ins, ("b1", "b1"), "int")
    fn, k = _compare_kind(p, t)
    klass = "int" if is_int(t) else "fp32"
    if pair:
        if combine:
            two = lambda a, b, c: (combine(r := fn(a, b), c), combine(~r, c))  # noqa: E731
            return Sem(two, (k, k, "b1"), ("b1", "b1"), klass)
        return Sem(lambda a, b: (r := fn(a, b), ~r), (k, k), ("b1", "b1"), klass)
    if combine:
        return Sem(lambda a, b, c: combine(fn(a, b), c), (k, k, "b1"), "b1", klass)
    return Sem(fn, (k, k), "b1", klass)


@op("set")
def _set(p, instr):
    combine = next((_BOOL[x] for x in p if x in _BOOL), None)
    dst, src = p[-2], p[-1]
    extra = ("b1",) if combine else ()

    def with_combine(f: Callable) -> Callable:
        return (lambda a, b, c: combine(f(a, b), c)) if combine else f

    if src.endswith("x2"):
        fn = with_combine(_compare_kind(p, src[:-2])[0])
        one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(dst, 0xFFFF)
        s16, m16 = np.uint32(16), np.uint32(0xFFFF)

        def packed(a, b, *c):
            low = fn((a & m16).astype(U2), (b & m16).astype(U2), *c)
            high = fn((a >> s16).astype(U2), (b >> s16).astype(U2), *c)
            return low.astype(U4) * U4.type(one) | (high.astype(U4) * U4.type(one) << s16)

        return Sem(packed, ("u4", "u4", *extra), "u4", "fp16")
    fn, k = _compare_kind(p, src)
    fn = with_combine(fn)
    one = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}.get(dst, -1)
    out = unsigned(kind(dst))
    value = _const(one, out)
    return Sem(lambda *xs: np.where(fn(*xs), value, np.zeros(1, out)), (k, k, *extra), out, "int")


@op("selp")
def _selp(p, instr):
    k = kind(p[-1])
    return Sem(lambda a, b, c: np.where(c, a, b), (k, k, "b1"), k, "int")


@op("slct")
def _slct(p, instr):
    k, kc = kind(p[-2]), kind(p[-1])
    return Sem(lambda a, b, c: np.where(c >= 0, a, b), (k, k, kc), k, "int")


# --- conversions ---------------------------------------------------------------------------

_TO_F64: dict[str, Callable] = {
    "f16": lambda x: nx.f16_to_f32(x).astype(F8),
    "bf16": lambda x: nx.bf16_to_f32(x).astype(F8),
    "f32": lambda x: x.astype(F8),
    "f64": lambda x: x,
}


def _to_int(x: np.ndarray, t: str, mode: str) -> np.ndarray:
    """f64 to an integer type: rounds, then clamps; NaN gives 0 (64 bits: the top bit)."""
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)
    k = np.dtype(kind(t))
    info = np.iinfo(k)
    if k.itemsize < 8:
        out = np.clip(np.where(np.isnan(x), 0.0, x), info.min, info.max)
        return out.astype(I8).astype(k)
    low, high = float(info.min), float(info.max)  # high rounds up to 2^63 or 2^64
    inside = np.where((x > low) & (x < high), x, 0.0)
    out = inside.astype(k)
    out = np.where(x >= high, k.type(info.max), np.where(x <= low, k.type(info.min), out))
    return np.where(np.isnan(x), np.array([1 << 63], U8).view(k), out)


def _relu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.where(np.isnan(x), x, 0.0))


def _narrow(dst: str, p: tuple[str, ...]) -> Callable:
    """f64 to the bits of a float format no wider than f32."""
    mode = "rna" if "rna" in p else _mode(p)
    relu, satfinite, sat = "relu" in p, "satfinite" in p, "sat" in p
    plain = mode == "rn" and not (relu or satfinite or sat)

    def fn(x: np.ndarray) -> np.ndarray:
        if plain and dst == "f32":
            return x.astype(F4).view(U4)
        if relu:
            x = _relu(x)
        if sat:
            x = np.clip(np.where(np.isnan(x), 0.0, x), 0.0, 1.0)
        out = nx.round_to_format(x, dst, mode)
        if satfinite and dst in ("f16", "bf16", "tf32"):
            man, _, emax = nx.FORMATS[dst]
            top = float(np.ldexp(2.0 - 2.0**-man, emax))
            out = np.clip(out, -top, top)
        return nx.encode(out, dst)

    return fn


@op("cvt")
def _cvt(p, instr):
    dst, src = p[-2], p[-1]
    two = len(instr.operands) == 3
    if dst in ("f16x2", "bf16x2") and src == "f32":
        base = dst[:-2]
        if _mode(p) == "rn" and not {"relu", "satfinite"} & set(p):
            narrow = _STORE[base]
        else:
            to = _narrow(base, p)
            narrow = lambda x: to(x.astype(F8))  # noqa: E731
        fn = lambda a, b: narrow(b).astype(U4) | (narrow(a).astype(U4) << U4.type(16))  # noqa: E731
        return Sem(fn, ("f4", "f4"), "u4", "cvt") if two else None
    if dst in ("e4m3x2", "e5m2x2"):
        to = _narrow(dst[:-2], p)
        join = lambda hi, lo: lo.astype(U2) | (hi.astype(U2) << U2.type(8))  # noqa: E731
        if src == "f32":
            fn = lambda a, b: join(to(a.astype(F8)), to(b.astype(F8)))  # noqa: E731
            return Sem(fn, ("f4", "f4"), "u2", "cvt")
        load = _TO_F64.get(src.removesuffix("x2"))
        if not load:
            return None

        def from_pair(x):
            halves = (x >> U4.type(16)).astype(U2), (x & U4.type(0xFFFF)).astype(U2)
            return join(*(to(load(h)) for h in halves))

        return Sem(from_pair, ("u4",), "u2", "cvt")
    if src in ("e4m3x2", "e5m2x2"):
        load8 = nx.e4m3_to_f32 if src == "e4m3x2" else nx.e5m2_to_f32
        store = _STORE[dst[:-2]]
        relu = "relu" in p

        def unpack(x):
            values = [load8(h) for h in ((x & U2.type(255)), (x >> U2.type(8)))]
            if relu:
                values = [_relu(v).astype(F4) for v in values]
            low, high = (store(v).astype(U4) for v in values)
            return low | (high << U4.type(16))

        return Sem(unpack, ("u2",), "u4", "cvt")
    if not (src in _TO_F64 or is_int(src)) or not (dst in _TO_F64 or is_int(dst) or dst == "tf32"):
        return None
    integral = next((m for m in ("rni", "rzi", "rmi", "rpi") if m in p), None)
    ks, kd = kind(src), kind(dst)
    if is_int(src):
        if is_int(dst):
            if "sat" in p:
                s, d = np.iinfo(ks), np.iinfo(kd)
                low, high = max(s.min, d.min), min(s.max, d.max)
                return Sem(
                    lambda x: np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(kd),
                    (ks,),
                    kd,
                    "cvt",
                )
            return Sem(lambda x: x.astype(kd), (ks,), kd, "cvt")
        if dst in ("f32", "f64") and _mode(p) == "rn" and "sat" not in p:
            return Sem(lambda x: x.astype(kd), (ks,), kd, "cvt")
        if int(ks[1]) == 8:
            if dst != "f32":
                # Through f64 rounded to odd, built from two exact halves.
                pass
            mode = _mode(p)

            def wide(x):
                high = (x >> x.dtype.type(32)).astype(F8) * 4294967296.0
                low = (x & x.dtype.type(0xFFFFFFFF)).astype(F8)
                return _narrow(dst, (mode,))(nx.round_odd(*nx._two_sum(high, low)))

            return Sem(wide, (ks,), unsigned(kd), "cvt") if dst != "f64" else None
        to = _narrow(dst, p)
        return Sem(lambda x: to(x.astype(F8)), (ks,), unsigned(kd), "cvt")
    load = _TO_F64[src]
    ftz = "ftz" in p and src == "f32"
    if is_int(dst):
        mode = integral or "rzi"
        fn = lambda x: _to_int(load(nx.flush(x) if ftz else x), dst, mode)  # noqa: E731
        return Sem(fn, (ks,), kd, "cvt")
    if integral and dst == src:
        rnd = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[integral]
        if dst in ("f32", "f64"):
            return Sem(_float_mods(lambda x: rnd(x), p), (ks,), kd, "cvt")
        fn, k = _small(dst, rnd)
        return Sem(fn, (k,), k, "cvt")
    if dst == "tf32":
        to = _narrow("tf32", p)
        return Sem(lambda x: to(x.astype(F8)), ("f4",), "u4", "cvt")
    plain = _mode(p) == "rn" and not {"relu", "satfinite", "sat", "ftz"} & set(p)
    if plain:
        direct = {
            ("f16", "f32"): nx.f32_to_f16,
            ("bf16", "f32"): nx.f32_to_bf16,
            ("f32", "f16"): nx.f16_to_f32,
            ("f32", "bf16"): nx.bf16_to_f32,
            ("f64", "f32"): lambda x: x.astype(F8),
            ("f32", "f64"): lambda x: x.astype(F4),
            ("f32", "f32"): lambda x: x.copy(),
        }.get((dst, src))
        if direct:
            return Sem(direct, (ks,), kd, "cvt")
    if dst == "f64":
        return Sem(load, (ks,), "f8", "cvt") if src != "f64" else Sem(np.copy, ("f8",), "f8", "cvt")
    to = _narrow(dst, p)
    flush_out = "ftz" in p and dst == "f32"

    def convert(x):
        if ftz:
            x = nx.flush(x)
        out = to(load(x))
        return nx.flush(out.view(F4)).view(U4) if flush_out else out

    return Sem(convert, (ks,), unsigned(kd), "cvt")


@op("mov")
def _mov(p, instr):
    k = unsigned(kind(p[-1])) if p[-1] != "pred" else "b1"
    return Sem(np.copy, (k,), k, "mov")

"""Register arithmetic of the simulator against plain Python: integers, and exact fractions."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptxsim.harness import elementwise

RNG = np.random.default_rng(11)


def ints(t: str, n: int = 300) -> np.ndarray:
    bits = int(t[1:])
    edge = [0, 1, 2, 3, 7, 8, 15, 31, 32, 33, 63, 64, 255, (1 << bits - 1) - 1, 1 << bits - 1]
    edge += [(1 << bits) - 1, (1 << bits) - 2]
    edge = [e & ((1 << bits) - 1) for e in edge]
    values = [*edge, *(int(x) for x in RNG.integers(0, 1 << 63, n - len(edge)) * 2 + 1)]
    values = [v & ((1 << bits) - 1) for v in values]
    return RNG.permutation(np.array(values, np.uint64)).astype(f"u{bits // 8}")


def floats32(n: int = 600, wide: bool = True) -> np.ndarray:
    edge = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        3e38,
        1e-45,
        -1e-40,
        1e-38,
    ]
    spread = RNG.integers(-40, 40, n) if wide else RNG.integers(-3, 3, n)
    x = (RNG.standard_normal(n) * 2.0**spread).astype("f4")
    x[: len(edge)] = edge
    return RNG.permutation(x)


def signed(v: int, bits: int) -> int:
    return v - (1 << bits) if v >> (bits - 1) & 1 else v


def cdiv(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def bit_reverse(a: int, bits: int) -> int:
    return int(f"{a:0{bits}b}"[::-1], 2)


def bfe(a: int, pos: int, length: int, bits: int, sign: bool) -> int:
    pos, length = pos & 255, length & 255
    top = bits - 1
    fill = (a >> min(pos + length - 1, top)) & 1 if sign and length else 0
    return sum(
        ((a >> (pos + i)) & 1 if i < length and pos + i <= top else fill) << i for i in range(bits)
    )


def bfi(a: int, b: int, pos: int, length: int, bits: int) -> int:
    pos, length = pos & 255, length & 255
    for i in range(length):
        if pos + i < bits:
            b = (b & ~(1 << (pos + i))) | ((a >> i) & 1) << (pos + i)
    return b


def prmt(a: int, b: int, c: int) -> int:
    source, out = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")], 0
    for i in range(4):
        sel = (c >> 4 * i) & 15
        byte = source[sel & 7]
        out |= (255 * (byte >> 7) if sel & 8 else byte) << 8 * i
    return out


def dot(a: int, b: int, c: int, sa: bool, sb: bool) -> int:
    pick = lambda x, i, s: signed(x >> 8 * i & 255, 8) if s else x >> 8 * i & 255  # noqa: E731
    return c + sum(pick(a, i, sa) * pick(b, i, sb) for i in range(4))


def lop3(table: int):
    def f(a: int, b: int, c: int) -> int:
        return sum(
            (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
            for i in range(32)
        )

    return f


S32, S64 = (lambda v: signed(v, 32)), (lambda v: signed(v, 64))

INTEGER = {
    "add.s32 D, A, B": ("b32", "b32 b32", lambda a, b: a + b),
    "add.s64 D, A, B": ("b64", "b64 b64", lambda a, b: a + b),
    "add.u16 D, A, B": ("b16", "b16 b16", lambda a, b: a + b),
    "add.sat.s32 D, A, B": (
        "b32", "b32 b32", lambda a, b: max(-(2**31), min(2**31 - 1, S32(a) + S32(b)))),
    "sub.s32 D, A, B": ("b32", "b32 b32", lambda a, b: a - b),
    "mul.lo.s32 D, A, B": ("b32", "b32 b32", lambda a, b: a * b),
    "mul.lo.s64 D, A, B": ("b64", "b64 b64", lambda a, b: a * b),
    "mul.hi.u32 D, A, B": ("b32", "b32 b32", lambda a, b: a * b >> 32),
    "mul.hi.s32 D, A, B": ("b32", "b32 b32", lambda a, b: S32(a) * S32(b) >> 32),
    "mul.hi.u64 D, A, B": ("b64", "b64 b64", lambda a, b: a * b >> 64),
    "mul.hi.s64 D, A, B": ("b64", "b64 b64", lambda a, b: S64(a) * S64(b) >> 64),
    "mul.wide.u32 D, A, B": ("b64", "b32 b32", lambda a, b: a * b),
    "mul.wide.s32 D, A, B": ("b64", "b32 b32", lambda a, b: S32(a) * S32(b)),
    "mul.wide.s16 D, A, B": ("b32", "b16 b16", lambda a, b: signed(a, 16) * signed(b, 16)),
    "mad.lo.s32 D, A, B, C": ("b32", "b32 b32 b32", lambda a, b, c: a * b + c),
    "mad.hi.u32 D, A, B, C": ("b32", "b32 b32 b32", lambda a, b, c: (a * b >> 32) + c),
    "mad.wide.s32 D, A, B, C": ("b64", "b32 b32 b64", lambda a, b, c: S32(a) * S32(b) + c),
    "mul24.lo.u32 D, A, B": (
        "b32", "b32 b32", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    "div.u32 D, A, B": ("b32", "b32 b32", lambda a, b: a // b if b else 2**32 - 1),
    "div.s32 D, A, B": ("b32", "b32 b32", lambda a, b: cdiv(S32(a), S32(b)) if b else -1),
    "rem.u32 D, A, B": ("b32", "b32 b32", lambda a, b: a % b if b else a),
    "rem.s32 D, A, B": (
        "b32", "b32 b32", lambda a, b: S32(a) - cdiv(S32(a), S32(b)) * S32(b) if b else a),
    "div.s64 D, A, B": ("b64", "b64 b64", lambda a, b: cdiv(S64(a), S64(b)) if b else -1),
    "min.s32 D, A, B": ("b32", "b32 b32", lambda a, b: min(S32(a), S32(b))),
    "max.u64 D, A, B": ("b64", "b64 b64", max),
    "abs.s32 D, A": ("b32", "b32", lambda a: abs(S32(a))),
    "neg.s32 D, A": ("b32", "b32", lambda a: -a),
    "sad.s32 D, A, B, C": ("b32", "b32 b32 b32", lambda a, b, c: c + abs(S32(a) - S32(b))),
    "sad.u32 D, A, B, C": ("b32", "b32 b32 b32", lambda a, b, c: c + abs(a - b)),
    "and.b32 D, A, B": ("b32", "b32 b32", lambda a, b: a & b),
    "xor.b64 D, A, B": ("b64", "b64 b64", lambda a, b: a ^ b),
    "not.b32 D, A": ("b32", "b32", lambda a: ~a),
    "cnot.b32 D, A": ("b32", "b32", lambda a: int(a == 0)),
    "shl.b32 D, A, B": ("b32", "b32 b32", lambda a, b: a << b if b < 32 else 0),
    "shr.u32 D, A, B": ("b32", "b32 b32", lambda a, b: a >> b if b < 32 else 0),
    "shr.s32 D, A, B": ("b32", "b32 b32", lambda a, b: S32(a) >> min(b, 31)),
    "shl.b64 D, A, B": ("b64", "b64 b32", lambda a, b: a << b if b < 64 else 0),
    "shr.s64 D, A, B": ("b64", "b64 b32", lambda a, b: S64(a) >> min(b, 63)),
    "shf.l.wrap.b32 D, A, B, C": (
        "b32", "b32 b32 b32", lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32),
    "shf.r.wrap.b32 D, A, B, C": ("b32", "b32 b32 b32", lambda a, b, c: (b << 32 | a) >> (c & 31)),
    "shf.r.clamp.b32 D, A, B, C": (
        "b32", "b32 b32 b32", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    "shf.l.clamp.b32 D, A, B, C": (
        "b32", "b32 b32 b32", lambda a, b, c: ((b << 32 | a) << min(c, 32)) >> 32),
    "popc.b32 D, A": ("b32", "b32", lambda a: a.bit_count()),
    "popc.b64 D, A": ("b32", "b64", lambda a: a.bit_count()),
    "clz.b32 D, A": ("b32", "b32", lambda a: 32 - a.bit_length()),
    "clz.b64 D, A": ("b32", "b64", lambda a: 64 - a.bit_length()),
    "bfind.u32 D, A": ("b32", "b32", lambda a: a.bit_length() - 1),
    "bfind.s32 D, A": (
        "b32", "b32", lambda a: (a if S32(a) >= 0 else ~S32(a)).bit_length() - 1),
    "bfind.shiftamt.u32 D, A": ("b32", "b32", lambda a: 32 - a.bit_length() if a else -1),
    "brev.b32 D, A": ("b32", "b32", lambda a: bit_reverse(a, 32)),
    "brev.b64 D, A": ("b64", "b64", lambda a: bit_reverse(a, 64)),
    "bfe.u32 D, A, B, C": ("b32", "b32 b32 b32", lambda a, p, n: bfe(a, p, n, 32, False)),
    "bfe.s32 D, A, B, C": ("b32", "b32 b32 b32", lambda a, p, n: bfe(a, p, n, 32, True)),
    "bfe.u64 D, A, B, C": ("b64", "b64 b32 b32", lambda a, p, n: bfe(a, p, n, 64, False)),
    "bfi.b32 D, A, B, C, E": (
        "b32", "b32 b32 b32 b32", lambda a, b, p, n: bfi(a, b, p, n, 32)),
    "prmt.b32 D, A, B, C": ("b32", "b32 b32 b32", prmt),
    "prmt.b32 D, A, B, 0x5410": ("b32", "b32 b32", lambda a, b: prmt(a, b, 0x5410)),
    "prmt.b32 D, A, B, 0x7632": ("b32", "b32 b32", lambda a, b: prmt(a, b, 0x7632)),
    "prmt.b32 D, A, B, 0xb3a1": ("b32", "b32 b32", lambda a, b: prmt(a, b, 0xB3A1)),
    "lop3.b32 D, A, B, C, 0x96": ("b32", "b32 b32 b32", lop3(0x96)),
    "lop3.b32 D, A, B, C, 0xca": ("b32", "b32 b32 b32", lop3(0xCA)),
    "lop3.b32 D, A, B, C, 0x1d": ("b32", "b32 b32 b32", lop3(0x1D)),
    "lop3.b32 D, A, B, C, 0xe8": ("b32", "b32 b32 b32", lop3(0xE8)),
    "dp4a.s32.s32 D, A, B, C": (
        "b32", "b32 b32 b32", lambda a, b, c: dot(a, b, c, True, True)),
    "dp4a.u32.s32 D, A, B, C": (
        "b32", "b32 b32 b32", lambda a, b, c: dot(a, b, c, False, True)),
    "cvt.s64.s32 D, A": ("b64", "b32", S32),
    "cvt.u64.u32 D, A": ("b64", "b32", lambda a: a),
    "cvt.u16.u32 D, A": ("b16", "b32", lambda a: a),
    "cvt.s32.s8 D, A": ("b32", "b32", lambda a: signed(a & 255, 8)),
    "cvt.sat.s8.s32 D, A": ("b32", "b32", lambda a: max(-128, min(127, S32(a)))),
    "cvt.sat.u8.s32 D, A": ("b32", "b32", lambda a: max(0, min(255, S32(a)))),
    "setp.lt.s32 D, A, B": ("pred", "b32 b32", lambda a, b: int(S32(a) < S32(b))),
    "setp.hs.u32 D, A, B": ("pred", "b32 b32", lambda a, b: int(a >= b)),
    "setp.ge.and.u32 D, A, B, C": ("pred", "b32 b32 pred", lambda a, b, c: int(a >= b and c)),
    "setp.ne.or.s64 D, A, B, C": ("pred", "b64 b64 pred", lambda a, b, c: int(a != b or c)),
    "setp.gt.xor.u16 D, A, B, C": ("pred", "b16 b16 pred", lambda a, b, c: int(a > b) ^ c),
    "set.lt.u32.s32 D, A, B": ("b32", "b32 b32", lambda a, b: -int(S32(a) < S32(b))),
    "selp.b32 D, A, B, C": ("b32", "b32 b32 pred", lambda a, b, c: a if c else b),
    "slct.b32.s32 D, A, B, C": ("b32", "b32 b32 b32", lambda a, b, c: a if S32(c) >= 0 else b),
}  # fmt: skip


@pytest.mark.parametrize("instr", INTEGER)
def test_integer(instr: str) -> None:
    out, types, f = INTEGER[instr]
    args = []
    for i, t in enumerate(types.split()):
        if t == "pred":
            args.append((t, RNG.integers(0, 2, 300).astype("u1")))
            continue
        values = ints("u" + t[1:])
        # Half of the shift amounts and field positions are small.
        if i and instr.startswith(("sh", "bf")):
            values = np.where(RNG.random(300) < 0.6, values % 40, values).astype(values.dtype)
        args.append((t, values))
    got = elementwise(instr, out, args)
    width = 8 * got.dtype.itemsize
    want = [f(*(int(v) for v in row)) & ((1 << width) - 1) for row in zip(*(a for _, a in args))]
    if instr.startswith("cvt.") and ".s8" in instr:
        want = [w & ((1 << width) - 1) for w in want]
    np.testing.assert_array_equal(got, np.array(want, np.uint64).astype(got.dtype))


def test_carry_chain() -> None:
    """A 128-bit sum and difference out of 64-bit halves."""
    from ptxsim.harness import ptx_kernel, run

    body = """
    .reg .b64 %x<6>; .reg .b64 %o;
    mul.wide.u32 %o, %t, 32; add.u64 %a0, %p0, %o; add.u64 %a1, %p1, %o;
    ld.global.v2.u64 {%x0, %x1}, [%a1]; ld.global.v2.u64 {%x2, %x3}, [%a1+16];
    add.cc.u64 %x4, %x0, %x2; addc.u64 %x5, %x1, %x3; st.global.v2.u64 [%a0], {%x4, %x5};
    sub.cc.u64 %x4, %x0, %x2; subc.u64 %x5, %x1, %x3; st.global.v2.u64 [%a0+16], {%x4, %x5};
    """
    x = RNG.integers(0, 1 << 63, (32, 4), dtype=np.uint64) * np.uint64(2)
    x[:8, 0] = 2**64 - 1
    out = np.zeros_like(x)
    run(ptx_kernel(body, 2), "k", 1, 32, out, x)
    for row, got in zip(x.tolist(), out.tolist()):
        a, b = row[0] | row[1] << 64, row[2] | row[3] << 64
        assert got[0] | got[1] << 64 == (a + b) % 2**128
        assert got[2] | got[3] << 64 == (a - b) % 2**128


# --- floats --------------------------------------------------------------------------------

FORMATS = {"f32": (24, -149, 128), "f16": (11, -24, 16), "bf16": (8, -133, 128)}


def rounded(x: Fraction, fmt: str, mode: str = "rn") -> float:
    """An exact value rounded to a format; overflow gives what IEEE says."""
    if x == 0:
        return 0.0
    precision, least, top = FORMATS[fmt]
    e = math.floor(math.log2(abs(x))) if abs(x) > Fraction(1, 10**300) else -1000
    while abs(x) >= Fraction(2) ** (e + 1):
        e += 1
    while abs(x) < Fraction(2) ** e:
        e -= 1
    ulp = Fraction(2) ** max(e - precision + 1, least)
    q = x / ulp
    n = {
        "rn": round(q), "rz": math.trunc(q), "rm": math.floor(q), "rp": math.ceil(q),
        "rna": math.floor(abs(q) + Fraction(1, 2)) * (1 if q > 0 else -1),
    }[mode]  # fmt: skip
    value = n * ulp
    if abs(value) >= Fraction(2) ** top:
        away = mode in ("rn", "rna") or ((mode == "rp") == (x > 0) and mode != "rz")
        limit = (Fraction(2) - Fraction(2) ** (1 - precision)) * Fraction(2) ** (top - 1)
        return math.copysign(math.inf if away else float(limit), x)
    return float(value)


def expect(f, fmt: str, mode: str, *args: np.ndarray) -> np.ndarray:
    out = []
    for row in zip(*args):
        row = [float(v) for v in row]
        if all(math.isfinite(v) for v in row):
            exact = f(*(Fraction(v) for v in row))
            value = rounded(exact, fmt, mode)
            out.append(value)
        else:
            with np.errstate(all="ignore"):
                out.append(float(f(*(np.float64(v) for v in row))))
    return np.array(out)


def same_numbers(got: np.ndarray, want: np.ndarray) -> None:
    """Equal including NaN positions; the sign of zero is not compared."""
    bad = ~((got == want) | (np.isnan(got) & np.isnan(want)))
    assert not bad.any(), (np.flatnonzero(bad)[:5], got[bad][:5], want[bad][:5])


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_f32_rounding(op: str, mode: str) -> None:
    f = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
    }[op]
    count = 3 if op == "fma" else 2
    args = [floats32(1000, wide=False) for _ in range(count)]
    # Results halfway between two f32, or below the normal range.
    args[0][:100] = (1 + RNG.integers(0, 1 << 12, 100) * 2.0**-12).astype("f4")
    args[1][:100] = (1 + RNG.integers(0, 1 << 12, 100) * 2.0**-12).astype("f4")
    if op == "fma":
        args[2][:50] = 2.0**-60
        args[2][50:100] = -(2.0**-60)
    args[0][100:150] *= np.float32(2.0**-100)
    args[1][100:150] *= np.float32(2.0**-40)
    letters = ", ".join("ABC"[:count])
    got = elementwise(f"{op}.{mode}.f32 D, {letters}", "f32", [("f32", a) for a in args])
    same_numbers(got.view("f4").astype("f8"), expect(f, "f32", mode, *args))


def test_f32_fma_does_not_round_twice() -> None:
    # a*b + c just above and just below a tie, by less than an f64 can hold next to it.
    a = np.float32(1 + 2.0**-12) * np.ones(4, "f4")
    b = np.float32(1 + 2.0**-12) * np.ones(4, "f4")
    c = np.array([2.0**-25, -(2.0**-25), 2.0**-70, -(2.0**-70)], "f4")
    got = elementwise("fma.rn.f32 D, A, B, C", "f32", [("f32", a), ("f32", b), ("f32", c)])
    want = expect(lambda x, y, z: x * y + z, "f32", "rn", a, b, c)
    np.testing.assert_array_equal(got.view("f4").astype("f8"), want)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("t", ["f16", "bf16", "f16x2", "bf16x2"])
def test_small_floats(op: str, t: str) -> None:
    base, pair = t.removesuffix("x2"), t.endswith("x2")
    count = 3 if op == "fma" else 2
    f = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
    }[op]
    dtype = torch.float16 if base == "f16" else torch.bfloat16
    values, bits = [], []
    for _ in range(count):
        x = torch.from_numpy(floats32(1200, wide=False)).to(dtype)
        values.append(x.double().numpy())
        raw = x.view(torch.int16).numpy().view("u2")
        bits.append(raw.view("u4") if pair else raw)
    mode = ".rn" if op == "fma" else ""
    letters = ", ".join("ABC"[:count])
    carrier = "b32" if pair else "b16"
    got = elementwise(f"{op}{mode}.{t} D, {letters}", carrier, [(carrier, b) for b in bits])
    got = torch.from_numpy(got.view("u2").view("i2").copy()).view(dtype).double().numpy()
    same_numbers(got, expect(f, base, "rn", *values))


@pytest.mark.parametrize(
    "t, mode", [(t, m) for t in ("f16", "bf16") for m in ("rn", "rz")] + [("tf32", "rna")]
)
def test_cvt_from_f32(t: str, mode: str) -> None:
    x = floats32(2000)
    x[100:200] = (RNG.standard_normal(100) * 2.0**-18).astype("f4")
    x[200:300] = (1 + (2 * RNG.integers(0, 1 << 10, 100) + 1) * 2.0**-11).astype("f4")
    if t == "tf32":
        FORMATS["tf32"] = (11, -136, 128)
        got = elementwise(f"cvt.{mode}.tf32.f32 D, A", "b32", [("f32", x)]).view("f4")
        same_numbers(got.astype("f8"), expect(lambda a: a, "tf32", mode, x))
        return
    dtype = torch.float16 if t == "f16" else torch.bfloat16
    got = elementwise(f"cvt.{mode}.{t}.f32 D, A", "b16", [("f32", x)])
    got = torch.from_numpy(got.view("i2").copy()).view(dtype).double().numpy()
    same_numbers(got, expect(lambda a: a, t, mode, x))


@pytest.mark.parametrize("t", ["f16x2", "bf16x2"])
def test_cvt_packs_first_operand_high(t: str) -> None:
    a, b = floats32(256), floats32(256)
    got = elementwise(f"cvt.rn.{t}.f32 D, A, B", "b32", [("f32", a), ("f32", b)])
    dtype = torch.float16 if t == "f16x2" else torch.bfloat16
    halves = torch.from_numpy(got.view("i2").copy()).view(dtype).double().numpy().reshape(-1, 2)
    for column, x in ((0, b), (1, a)):
        same_numbers(halves[:, column], torch.from_numpy(x).to(dtype).double().numpy())


@pytest.mark.parametrize("t", ["e4m3", "e5m2"])
def test_fp8(t: str) -> None:
    dtype = torch.float8_e4m3fn if t == "e4m3" else torch.float8_e5m2
    top = torch.finfo(dtype).max
    x = floats32(2000)
    x[::2] = (RNG.standard_normal(1000) * 2.0 ** RNG.integers(-12, 9, 1000)).astype("f4")
    y = np.roll(x, 1)
    got = elementwise(f"cvt.rn.satfinite.{t}x2.f32 D, A, B", "b16", [("f32", x), ("f32", y)])

    def bits(v: np.ndarray) -> np.ndarray:
        return torch.from_numpy(v).clamp(-top, top).to(dtype).view(torch.uint8).numpy()

    high, low = (got >> 8).astype("u1"), (got & 255).astype("u1")
    for part, v in ((high, x), (low, y)):
        nan = np.isnan(v)
        np.testing.assert_array_equal(part[~nan], bits(v)[~nan])
        assert (part[nan] & 0x7F == 0x7F).all()
    # And back: every code.
    codes = np.arange(256, dtype="u2")
    pairs = codes | (codes[::-1] << np.uint16(8))
    back = elementwise(f"cvt.rn.f16x2.{t}x2 D, A", "b32", [("b16", pairs)]).view("f2")
    want = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float64).numpy()
    same_numbers(back[0::2].astype("f8"), want)
    same_numbers(back[1::2].astype("f8"), want[::-1])


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("t", ["s32", "u32", "s64", "u8", "s16"])
def test_cvt_to_integer(t: str, mode: str) -> None:
    x = floats32(800)
    x[:40] = np.arange(-20, 20) * 0.5
    out = f"b{max(int(t[1:]), 16)}"
    got = elementwise(f"cvt.{mode}.{t}.f32 D, A", out, [("f32", x)])
    bits = int(t[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if t[0] == "s" else (0, (1 << bits) - 1)
    f = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode]
    want = []
    for v in x.tolist():
        if math.isnan(v):
            want.append(1 << 63 if bits == 64 else 0)
        elif math.isinf(v):
            want.append(high if v > 0 else low)
        else:
            want.append(max(low, min(high, f(v))))
    width = 8 * got.dtype.itemsize
    np.testing.assert_array_equal(
        got, np.array([w & ((1 << width) - 1) for w in want], np.uint64).astype(got.dtype)
    )


@pytest.mark.parametrize("t", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_cvt_from_integer(t: str, mode: str) -> None:
    x = ints("u" + t[1:], 500)
    got = elementwise(f"cvt.{mode}.f32.{t} D, A", "f32", [(f"b{t[1:]}", x)]).view("f4")
    values = [signed(int(v), int(t[1:])) if t[0] == "s" else int(v) for v in x]
    want = [rounded(Fraction(v), "f32", mode) for v in values]
    np.testing.assert_array_equal(got.astype("f8"), want)


def test_round_to_integral_and_saturate() -> None:
    x = floats32(600)
    x[:40] = np.arange(-20, 20) * 0.5
    for mode, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        got = elementwise(f"cvt.{mode}.f32.f32 D, A", "f32", [("f32", x)]).view("f4")
        same_numbers(got, f(x))
    got = elementwise("cvt.sat.f32.f32 D, A", "f32", [("f32", x)]).view("f4")
    same_numbers(got, np.where(np.isnan(x), 0, np.clip(x, 0, 1)))


@pytest.mark.parametrize("t", ["f32", "f16", "bf16"])
def test_min_max(t: str) -> None:
    a, b = floats32(600), floats32(600)
    a[:4], b[:4] = [0.0, -0.0, np.nan, 1.0], [-0.0, 0.0, 1.0, np.nan]
    if t == "f32":
        bits, carrier = [a, b], "f32"
        widen = lambda r: r.view("f4").astype("f8")  # noqa: E731
    else:
        dtype = torch.float16 if t == "f16" else torch.bfloat16
        tensors = [torch.from_numpy(x).to(dtype) for x in (a, b)]
        bits, carrier = [x.view(torch.int16).numpy().view("u2") for x in tensors], "b16"
        a, b = (x.double().numpy() for x in tensors)
        widen = lambda r: torch.from_numpy(r.view("i2").copy()).view(dtype).double().numpy()  # noqa: E731
    for name, f in (("min", np.fmin), ("max", np.fmax)):
        got = widen(elementwise(f"{name}.{t} D, A, B", carrier, [(carrier, x) for x in bits]))
        same_numbers(got, f(a, b))
        assert np.signbit(got[0]) == (name == "min") and np.signbit(got[1]) == (name == "min")
        got = widen(elementwise(f"{name}.NaN.{t} D, A, B", carrier, [(carrier, x) for x in bits]))
        same_numbers(got, (np.minimum if name == "min" else np.maximum)(a, b))


APPROX = {
    "rcp.approx.ftz.f32": lambda x: 1 / x,
    "rcp.rn.f32": lambda x: 1 / x,
    "sqrt.rn.f32": np.sqrt,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
    "ex2.approx.ftz.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "sin.approx.f32": np.sin,
    "cos.approx.f32": np.cos,
    "tanh.approx.f32": np.tanh,
}


@pytest.mark.parametrize("op", APPROX)
def test_special_functions(op: str) -> None:
    x = floats32(600)
    if "ftz" in op:
        x = np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)
    got = elementwise(f"{op} D, A", "f32", [("f32", x)]).view("f4")
    with np.errstate(all="ignore"):
        want = APPROX[op](x.astype("f8")).astype("f4")
    if "ftz" in op:
        want = np.where(np.abs(want) < 2.0**-126, np.float32(0), want)
    same_numbers(got, want)


def test_compare_floats() -> None:
    a, b = floats32(600), floats32(600)
    b[:200] = a[:200]
    nan = np.isnan(a) | np.isnan(b)
    for cmp, f in (
        ("lt", a < b), ("ge", a >= b), ("eq", a == b), ("ne", (a != b) & ~nan),
        ("ltu", (a < b) | nan), ("neu", (a != b) | nan), ("num", ~nan), ("nan", nan),
    ):  # fmt: skip
        got = elementwise(f"setp.{cmp}.f32 D, A, B", "pred", [("f32", a), ("f32", b)])
        np.testing.assert_array_equal(got.astype(bool), f)


def test_f64() -> None:
    a, b, c = (floats32(400).astype("f8") * (1 + 2.0**-30) for _ in range(3))
    got = elementwise("fma.rn.f64 D, A, B, C", "f64", [("f64", a), ("f64", b), ("f64", c)])
    want = []
    for x, y, z in zip(a, b, c):
        if all(map(math.isfinite, (x, y, z))):
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            want.append(exact.numerator / exact.denominator if exact else 0.0)
        else:
            with np.errstate(all="ignore"):
                want.append(x * y + z)
    same_numbers(got.view("f8"), np.array(want))
    got = elementwise("cvt.rn.f32.f64 D, A", "f32", [("f64", a)]).view("f4")
    with np.errstate(all="ignore"):
        same_numbers(got, a.astype("f4"))


def test_flush_to_zero() -> None:
    x = np.array([1e-40, -1e-40, 1.0, 2.0**-126], "f4")
    one = np.ones(4, "f4")
    plain = elementwise("mul.f32 D, A, B", "f32", [("f32", x), ("f32", one)]).view("f4")
    np.testing.assert_array_equal(plain, x)
    flushed = elementwise("mul.ftz.f32 D, A, B", "f32", [("f32", x), ("f32", one)]).view("f4")
    np.testing.assert_array_equal(flushed, np.array([0, -0.0, 1, 2.0**-126], "f4"))
    assert np.signbit(flushed[1])


def test_immediates_in_every_notation() -> None:
    a = np.ones(4, "f4")
    for text, value in (
        ("0f40490FDB", math.pi),
        ("0d4000000000000000", 2.0),
        ("0.5", 0.5),
        ("2.", 2.0),
    ):
        got = elementwise(f"mul.f32 D, A, {text}", "f32", [("f32", a)]).view("f4")
        assert got[0] == np.float32(value)
    b = np.full(4, 5, "u4")
    for text, value in (("-1", 4), ("0x10", 21), ("010", 13), ("7U", 12)):
        assert elementwise(f"add.s32 D, A, {text}", "b32", [("b32", b)])[0] == value


def test_half_pair_bits() -> None:
    x = struct.unpack("<I", np.array([1.5, -2.0], "f2").tobytes())[0]
    got = elementwise("neg.f16x2 D, A", "b32", [("b32", np.array([x], "u4"))])
    assert got.view("f2").tolist() == [-1.5, 2.0]

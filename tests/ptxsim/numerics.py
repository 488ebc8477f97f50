"""Number formats: exact f32/f16/bf16/fp8/tf32 conversions, rounding modes, fused multiply-add.

Small formats travel as unsigned bit patterns. Everything rounds once: where a wider type does the
work and could round twice, the wide result is first rounded to odd.
"""

from __future__ import annotations

import numpy as np

F4, F8, U1, U2, U4, U8 = (np.dtype(t) for t in ("f4", "f8", "u1", "u2", "u4", "u8"))
I4, I8 = np.dtype("i4"), np.dtype("i8")
_FLT_MIN = np.float32(2.0**-126)
_NAN32 = np.uint32(0x7FFFFFFF)


# --- f16, bf16, fp8 as bit patterns --------------------------------------------------------

_F16 = np.arange(65536, dtype=U2).view(np.float16).astype(F4)


def _fp8_table(exp_bits: int) -> np.ndarray:
    man_bits, bias = 7 - exp_bits, (1 << (exp_bits - 1)) - 1
    code = np.arange(256)
    exponent, mantissa = (code >> man_bits) & ((1 << exp_bits) - 1), code & ((1 << man_bits) - 1)
    value = np.where(
        exponent == 0,
        np.ldexp(mantissa.astype(F8), 1 - bias - man_bits),
        np.ldexp(1.0 + mantissa / (1 << man_bits), exponent - bias),
    )
    if exp_bits == 4:
        value[(code & 0x7F) == 0x7F] = np.nan
    else:
        value[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(code & 0x80, -value, value).astype(F4)


_E4M3, _E5M2 = _fp8_table(4), _fp8_table(5)


def f16_to_f32(x: np.ndarray) -> np.ndarray:
    return _F16[x]


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    return (x.astype(U4) << np.uint32(16)).view(F4)


def e4m3_to_f32(x: np.ndarray) -> np.ndarray:
    return _E4M3[x]


def e5m2_to_f32(x: np.ndarray) -> np.ndarray:
    return _E5M2[x]


def f32_to_f16(x: np.ndarray) -> np.ndarray:
    out = x.astype(np.float16).view(U2)
    nan = np.isnan(x)
    if nan.any():
        out[nan] = 0x7FFF
    return out


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(U4)
    out = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    out = out.astype(U2)
    nan = np.isnan(x)
    if nan.any():
        out[nan] = 0x7FFF
    return out


# --- rounding ------------------------------------------------------------------------------

# Mantissa bits, least and greatest exponent of normal numbers.
FORMATS = {
    "f32": (23, -126, 127),
    "tf32": (10, -126, 127),
    "f16": (10, -14, 15),
    "bf16": (7, -126, 127),
    "e4m3": (3, -6, 8),
    "e5m2": (2, -14, 15),
}


def round_to_format(x: np.ndarray, fmt: str, mode: str) -> np.ndarray:
    """Rounds f64 values to the grid of `fmt` (rn, rna, rz, rm, rp); overflow follows the mode."""
    man_bits, emin, emax = FORMATS[fmt]
    _, exponent = np.frexp(x)
    scale = np.maximum(exponent - 1, emin) - man_bits
    q = np.ldexp(x, -scale)
    if mode == "rn":
        q = np.rint(q)
    elif mode == "rna":
        q = np.copysign(np.floor(np.abs(q) + 0.5), q)
    elif mode == "rz":
        q = np.trunc(q)
    elif mode == "rm":
        q = np.floor(q)
    else:
        q = np.ceil(q)
    out = np.copysign(np.ldexp(q, scale), x)
    largest = float(np.ldexp(2.0 - 2.0**-man_bits, emax)) if fmt != "e4m3" else 448.0
    over = np.abs(out) > largest
    if over.any():
        toward_zero = {"rz": True, "rm": out > 0, "rp": out < 0}.get(mode, False)
        limit = np.where(toward_zero & np.isfinite(x), largest, np.inf)
        out = np.where(over, np.copysign(limit, out), out)
    return np.where(np.isfinite(x), out, x)


def encode(x: np.ndarray, fmt: str) -> np.ndarray:
    """Bit patterns of f64 values that already lie on the grid of `fmt`."""
    nan = np.isnan(x)
    if fmt == "f16":
        out = x.astype(np.float16).view(U2)
        return np.where(nan, U2.type(0x7FFF), out)
    if fmt == "bf16":
        out = (x.astype(F4).view(U4) >> np.uint32(16)).astype(U2)
        return np.where(nan, U2.type(0x7FFF), out)
    if fmt in ("f32", "tf32"):
        return np.where(nan, _NAN32, x.astype(F4).view(U4))
    # fp8 saturates to the greatest finite value: the instruction set has no other form.
    greatest, code = (448.0, 0x7F) if fmt == "e4m3" else (57344.0, 0x7F)
    x = np.where(nan, 0.0, np.clip(x, -greatest, greatest))
    man_bits, emin, _ = FORMATS[fmt]
    _, exponent = np.frexp(x)
    exponent = np.where(x == 0, emin, np.maximum(exponent - 1, emin))
    mantissa = np.ldexp(np.abs(x), man_bits - exponent).astype(np.int64)
    field = (exponent - emin).astype(np.int64) << man_bits
    out = (mantissa + field).astype(U1) | (np.signbit(x).astype(U1) << np.uint8(7))
    return np.where(nan, U1.type(code), out)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def round_odd(s: np.ndarray, error: np.ndarray) -> np.ndarray:
    """The f64 s with the sticky information of `error` in its last bit."""
    bits = s.view(I8)
    step = np.where((error > 0) == (s > 0), 1, -1)
    fix = (error != 0) & ((bits & 1) == 0) & np.isfinite(s)
    return np.where(fix, bits + step, bits).view(F8)


def fma_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a*b + c as f64 rounded to odd, for operands whose product is exact in f64."""
    return round_odd(*_two_sum(a * b, c))


_LOW, _HALF = np.uint64(0x1FFFFFFF), np.uint64(0x10000000)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    product = a.astype(F8) * b.astype(F8)
    s = product + c.astype(F8)
    out = s.astype(F4)
    # Only an f64 that lies halfway between two f32 (or becomes subnormal) can round twice.
    doubt = (s.view(U8) & _LOW) == _HALF
    if np.abs(out).min(initial=1.0) < _FLT_MIN:
        doubt |= (np.abs(s) < _FLT_MIN) & (s != 0)
    if doubt.any():
        a, b, c = np.broadcast_arrays(a, b, c)
        exact = fma_odd(a[doubt].astype(F8), b[doubt].astype(F8), c[doubt].astype(F8))
        out[doubt] = exact.astype(F4)
    return out


def fma32_directed(a: np.ndarray, b: np.ndarray, c: np.ndarray, mode: str) -> np.ndarray:
    exact = fma_odd(a.astype(F8), b.astype(F8), c.astype(F8))
    return f64_to_f32(exact, mode)


def f64_to_f32(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    if mode == "rn":
        return x.astype(F4)
    out = x.astype(F4)
    back = out.astype(F8)
    down, up = np.float32(-np.inf), np.float32(np.inf)
    if mode == "rm":
        wrong, toward = back > x, down
    elif mode == "rp":
        wrong, toward = back < x, up
    else:
        wrong, toward = np.abs(back) > np.abs(x), np.float32(0)
    return np.where(wrong, np.nextafter(out, toward), out)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Correctly rounded f64 fma (Boldo and Melquiond), away from overflow and underflow."""

    def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        t = x * 134217729.0
        high = t - (t - x)
        return high, x - high

    product = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    low = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    th, tl = _two_sum(c, low)
    vh, vl = _two_sum(product, th)
    out = vh + round_odd(*_two_sum(tl, vl))
    return np.where(np.isfinite(out), out, product + c)


def add_directed(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
    """f32 addition with a directed rounding mode."""
    return f64_to_f32(round_odd(*_two_sum(a.astype(F8), b.astype(F8))), mode)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal f32 become zero of the same sign."""
    tiny = np.abs(x) < _FLT_MIN
    if tiny.any():
        return np.where(tiny, np.copysign(np.float32(0), x), x)
    return x


def fmin(a: np.ndarray, b: np.ndarray, nan: bool) -> np.ndarray:
    out = np.minimum(a, b) if nan else np.fmin(a, b)
    zero = out == 0
    if zero.any():
        out = np.where(zero & (np.signbit(a) | np.signbit(b)) & (a == b), out.dtype.type(-0.0), out)
    return out.astype(a.dtype, copy=False)


def fmax(a: np.ndarray, b: np.ndarray, nan: bool) -> np.ndarray:
    out = np.maximum(a, b) if nan else np.fmax(a, b)
    zero = out == 0
    if zero.any():
        out = np.where(zero & ~(np.signbit(a) & np.signbit(b)) & (a == b), np.abs(out), out)
    return out.astype(a.dtype, copy=False)

"""csrc/cpu/common/vec.h, one level at a time, against torch's own conversions.

Levels that this processor lacks are compiled over tests/cpp/emulation (SIMDe's portable
intrinsics, Debian's libsimde-dev), so that their code is executed all the same.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import mtp_ext

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {"generic": (0, []), "avx2": (1, AVX2), "avx512": (2, AVX512)}
ORDER = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]


@pytest.fixture(scope="module", params=list(LEVELS))
def probe(request, tmp_path_factory):
    level, flags = LEVELS[request.param]
    if level > ORDER.index(mtp_ext.build_info()["cpu_isa"]):
        if request.param != "avx512" or not Path("/usr/include/simde").exists():
            pytest.skip(f"no {request.param} here, and no SIMDe (libsimde-dev) to emulate it")
        flags = ["-I", str(HERE / "cpp" / "emulation")]
    library = tmp_path_factory.mktemp("vec") / f"vec_{request.param}.so"
    command = [
        CXX, "-std=c++20", "-O2", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
        "-Wno-psabi", *flags, f"-DMTP_ISA={request.param}", f"-DMTP_ISA_LEVEL={level}",
        "-I", str(CSRC), "-I", str(CSRC / "include"), str(HERE / "cpp" / "vec_probe.cpp"),
        "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


FORMATS = {
    "bf16": (torch.bfloat16, torch.uint16, 2**16),
    "f16": (torch.float16, torch.uint16, 2**16),
    "e4m3": (torch.float8_e4m3fn, torch.uint8, 2**8),
    "i8": (torch.int8, torch.uint8, 2**8),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_pattern_widens_exactly(probe, name):
    dtype, bits, count = FORMATS[name]
    source = torch.arange(count, dtype=torch.int32).to(bits).view(dtype)
    vector, scalar = torch.empty(2, count)
    getattr(probe, f"widen_{name}")(
        pointer(source), pointer(vector), pointer(scalar), ctypes.c_int64(count)
    )
    assert same(vector, source.float())
    assert same(scalar, source.float())
    signs = torch.signbit(source.float())
    assert torch.equal(torch.signbit(vector)[signs == signs], signs) or name == "e4m3"


@pytest.mark.parametrize("name", ["bf16", "f16", "e4m3"])
def test_narrowing_rounds_to_nearest_even(probe, name):
    dtype, bits, count = FORMATS[name]
    exact = torch.arange(count, dtype=torch.int32).to(bits).view(dtype).float()
    finite = exact[exact.isfinite()].unique()
    # Every representable value, every midpoint, and one ulp to either side of each.
    middle = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    values = torch.cat([finite, middle, torch.tensor([3e38, -3e38, float("inf"), float("nan")])])
    up = torch.tensor(float("inf"))
    values = torch.cat([values, torch.nextafter(values, up), torch.nextafter(values, -up)])
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([values, torch.randn(50000, generator=generator) * 300])
    values = torch.nn.functional.pad(values, (0, -len(values) % 16))
    vector, scalar = torch.empty(2, len(values), dtype=bits)
    getattr(probe, f"narrow_{name}")(
        pointer(values), pointer(vector), pointer(scalar), ctypes.c_int64(len(values))
    )
    expected = values
    if name == "e4m3":  # saturating
        expected = values.clamp(-448, 448)
    expected = expected.to(dtype).float()
    assert same(vector.view(dtype).float(), expected)
    assert same(scalar.view(dtype).float(), expected)


def test_lane_operations(probe):
    generator = torch.Generator().manual_seed(1)
    for trial in range(50):
        x = torch.randn(16, generator=generator) * 10
        y = torch.where(torch.rand(16, generator=generator) < 0.2, x, x.flip(0))
        x[trial % 16] = float("nan") if trial % 3 == 0 else x[trial % 16]
        count = trial % 17
        out, bits = torch.empty(18 * 16 + 2), torch.empty(2, dtype=torch.int32)
        probe.lanes(pointer(x), pointer(y), ctypes.c_int64(count), pointer(out), pointer(bits))
        first = torch.arange(16) < count
        nearest = x.round()
        expected = [
            x + y, x - y, x * y, x / y, None,
            torch.where(x > y, x, y), torch.where(x < y, x, y), x.abs(), nearest, None, None,
            torch.where(x < y, x, y), torch.where(x <= y, x, y),
            torch.where(x == y, x, torch.zeros(())), x.nan_to_num(0.0),
            torch.where(first, x, torch.tensor(-1.0)), torch.where(first, x, y), x.floor(),
        ]  # fmt: skip
        rows = out[:-2].view(18, 16)
        for i, value in enumerate(expected):
            if value is not None:
                assert same(rows[i], value), i
        ok = ~x.isnan()
        fused = (x.double() * y.double() + y.double()).float()
        torch.testing.assert_close(rows[4][ok], fused[ok], rtol=2e-6, atol=1e-5)
        assert torch.equal(rows[9][ok], torch.exp2(nearest[ok]))
        folded = x.clone()
        for width in (8, 4, 2, 1):
            folded[:width] += folded[width : 2 * width].clone()
        assert same(out[-2:-1], folded[:1])
        if bool(ok.all()):
            assert out[-1] == x.max()
        assert bits[0].item() & 0xFFFF == int(((x < y).int() << torch.arange(16)).sum())
        assert bits[1].item() == 0xA5C3


def test_exp_is_within_two_ulp(probe):
    x = torch.linspace(-87, 88, 1 << 18)
    out = torch.empty_like(x)
    probe.exp_all(pointer(x), pointer(out), ctypes.c_int64(len(x)))
    exact = np.exp(x.double().numpy())
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(out.double().numpy() - exact) / ulp).max() <= 2.0
    edge = torch.tensor([-1e30, -104.0, 0.0, 89.0, float("inf"), -float("inf"), float("nan"), 1.0])
    edge = torch.cat([edge, edge])
    out = torch.empty(16)
    probe.exp_all(pointer(edge), pointer(out), ctypes.c_int64(16))
    inf = float("inf")
    assert out[:6].tolist() == [0.0, 0.0, 1.0, inf, inf, 0.0]
    assert out[6].isnan()

"""The arithmetic that CPU and CUDA share: exact where it must be, accurate where it is rounded."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_cpu_vectors import CSRC, CXX, HERE, LEVELS, ORDER

import mtp_ext

ACCURACY = r"""
#include "mtp/exponential.h"
extern "C" void exponentials(const uint32_t* words, float* x, float* e, long n) {
  for (long i = 0; i < n; ++i) e[i] = mtp::exponential(x[i] = mtp::race_uniform(words[i]));
}
extern "C" void exps(const float* z, float* w, long n) {
  for (long i = 0; i < n; ++i) w[i] = mtp::exp_nonpositive(z[i]);
}
"""


def build(folder: Path, source: Path, *flags: str) -> ctypes.CDLL:
    library = folder / f"{source.stem}.so"
    subprocess.run(
        [CXX, "-std=c++20", "-O2", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
         "-Wno-psabi", *flags, "-I", str(CSRC), "-I", str(CSRC / "include"), str(source),
         "-o", str(library)], check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("name", list(LEVELS))
def test_vectors_equal_scalars(tmp_path, name):
    """Philox words, uniforms and integer sums at every level; e^z and log1p too where fmadd is
    fused, that is on all levels but the generic and the emulated one."""
    level, flags = LEVELS[name]
    fused = level > 0
    if level > ORDER.index(mtp_ext.build_info()["cpu_isa"]):
        if name != "avx512" or not Path("/usr/include/simde").exists():
            pytest.skip(f"no {name} here, and no SIMDe (libsimde-dev) to emulate it")
        flags, fused = ["-I", str(HERE / "cpp" / "emulation")], False
    flags = [*flags, f"-DMTP_ISA={name}", f"-DMTP_ISA_LEVEL={level}"]
    probe = build(tmp_path, HERE / "cpp" / "race_probe.cpp", *flags)
    assert probe.race_probe(int(fused)) == 0


def test_accuracy(tmp_path):
    """Below 1.2 units in the last place over a sweep of all words and exponents."""
    source = tmp_path / "accuracy.cpp"
    source.write_text(ACCURACY)
    flags = [] if mtp_ext.build_info()["cpu_isa"] == "generic" else ["-mavx2", "-mfma"]
    library = build(tmp_path, source, *flags)

    def pointer(a: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(a.ctypes.data)

    def ulps(got: np.ndarray, exact: np.ndarray) -> float:
        _, exponent = np.frexp(exact)
        return float((np.abs(got - exact) / np.ldexp(1.0, exponent - 24)).max())

    words = np.concatenate(
        [np.arange(2**16), np.arange(0, 2**32, 2111), 2**32 - 1 - np.arange(2**16)]
    ).astype(np.uint32)
    x, e = np.empty(len(words), np.float32), np.empty(len(words), np.float32)
    library.exponentials(pointer(words), pointer(x), pointer(e), ctypes.c_long(len(words)))
    assert x.min() > 0 and x.max() < 1
    assert ulps(e, -np.log1p(-x.astype(np.float64))) < 1.2
    z = np.linspace(-86.9, 0, 2**20, dtype=np.float32)
    w = np.empty_like(z)
    library.exps(pointer(z), pointer(w), ctypes.c_long(len(z)))
    assert ulps(w, np.exp(z.astype(np.float64))) < 1.2

"""The tiled matrix product behind large M (csrc/cuda/common/gemm.cuh), on the simulator."""

import hashlib

import pytest
import torch
from projections import assert_as_good_as, normal
from ptxsim import runtime
from ptxsim.harness import cutlass_headers, nvcc

ROOT = runtime.ROOT
TYPES = {
    torch.float32: "float",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
    torch.int8: "int8_t",
    torch.float8_e4m3fn: "__nv_fp8_e4m3",
}
CUTLASS = cutlass_headers()
pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc, to compile the kernel to PTX")

SOURCE = r"""
#include "cuda/common/gemm.cuh"
#include "cuda/common/launch.cuh"
using namespace mtp::cuda;

template <typename G, typename A, typename B>
__global__ void __launch_bounds__(G::kThreads, G::kCtasPerSm)
    kernel(Matrix<A> a, Matrix<B> b, float* c, int64_t k) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const int64_t m = static_cast<int64_t>(blockIdx.x) * G::kTile;
  const int64_t n = static_cast<int64_t>(blockIdx.y) * G::kTile;
  typename G::Accumulator acc = {};
  G::multiply(a, m, b, n, 0, k, smem, acc);
  G::each_pair(acc, [&](int row, int column, float x, float next) {
    float* to = c + (m + row) * b.extent + n + column;
    if (m + row < a.extent && n + column < b.extent) to[0] += x;
    if (m + row < a.extent && n + column + 1 < b.extent) to[1] += next;
  });
}

template <typename A, Order kA, typename B, Order kB>
int launch(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k,
           int64_t a_stride, int64_t b_stride) {
  using G = Gemm<A, kA, B, kB>;
  const auto f = kernel<G, A, B>;
  cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSmemBytes);
  const dim3 grid((m + 127) / 128, (n + 127) / 128);
  f<<<grid, G::kThreads, G::kSmemBytes>>>({static_cast<const A*>(a), a_stride, m},
                                          {static_cast<const B*>(b), b_stride, n}, c, k);
  return cudaGetLastError();
}
#define EXPORT(NAME, A, KA, B, KB)                                                               \
  extern "C" int NAME(const void* a, const void* b, float* c, int64_t m, int64_t n, int64_t k,   \
                      int64_t a_stride, int64_t b_stride) {                                      \
    return launch<A, Order::KA, B, Order::KB>(a, b, c, m, n, k, a_stride, b_stride);             \
  }
"""

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
I8, E4M3 = torch.int8, torch.float8_e4m3fn
FORMS = {"nt": ("kInner", "kInner"), "nn": ("kInner", "kOuter"), "tn": ("kOuter", "kOuter")}
CASES = [
    *[(form, dtype, dtype) for form in FORMS for dtype in (F32, F16, BF16)],
    ("nt", BF16, I8),
    ("nt", BF16, E4M3),
    ("nt", F32, BF16),
    ("nt", F32, F16),
    ("nt", F32, I8),
    ("nn", F32, BF16),
    ("tn", F32, BF16),
]


def name_of(form, a, b):
    return f"gemm_{form}_{a}_{b}".replace("torch.", "")


@pytest.fixture(scope="module")
def library():
    lines = [
        f"EXPORT({name_of(form, a, b)}, {TYPES[a]}, {FORMS[form][0]}, {TYPES[b]}, {FORMS[form][1]})"
        for form, a, b in CASES
    ]
    headers = sorted((ROOT / "csrc/cuda/common").glob("*.cuh"))
    digest = hashlib.sha256(b"".join(h.read_bytes() for h in headers)).hexdigest()
    text = "\n".join([f"// {digest}", SOURCE, *lines])
    flags = [f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include"]
    if CUTLASS:
        flags += [f"-I{CUTLASS}", "-DMTP_WITH_CUTLASS"]
    return runtime.compile(text, archs=("80", "90a"), flags=tuple(flags))


def stored(x, outer, fill):
    """x [rows, k] as the kernel wants it, k innermost or not: 16-byte rows, `fill` behind them."""
    x = x.T if outer else x
    per = 16 // x.element_size()
    wide = torch.full((x.shape[0], -(-x.shape[1] // per) * per + per), fill).to(x.dtype)
    wide[:, : x.shape[1]] = x
    return wide


def values(rows, k, dtype, seed):
    x = normal(rows, k, seed=seed)
    return (x * 40).clamp(-127, 127).round().to(dtype) if dtype == I8 else x.to(dtype)


@pytest.mark.parametrize("device", ["h100", "a100"])
@pytest.mark.parametrize("form,a_dtype,b_dtype", CASES, ids=lambda value: str(value))
def test_matches_float64(library, form, a_dtype, b_dtype, device):
    function = name_of(form, a_dtype, b_dtype)
    for m, n, k in [(130, 137, 75), (1, 1, 1), (40, 17, 200)]:
        a, b = values(m, k, a_dtype, 1), values(n, k, b_dtype, 2)
        c = torch.zeros(m, n)
        a_there, b_there = (
            stored(x, order == "kOuter", 0 if x.dtype == I8 else float("nan"))
            for x, order in zip((a, b), FORMS[form])
        )
        with runtime.record(device) as launches:
            error = library.call(
                function, a=a_there, b=b_there, c=c, m=m, n=n, k=k,
                a_stride=a_there.shape[1], b_stride=b_there.shape[1],
            )  # fmt: skip
        assert error == 0
        assert launches[0].bank_conflicts == 0
        assert_as_good_as(c, a.float() @ b.float().T, a.double() @ b.double().T)


def test_adds_to_what_is_there(library):
    a, b, c = values(5, 16, BF16, 1), values(9, 16, BF16, 2), torch.ones(5, 9)
    name = name_of("nt", BF16, BF16)
    library.call(name, a=a, b=b, c=c, m=5, n=9, k=16, a_stride=16, b_stride=16)
    assert_as_good_as(c, 1 + a.float() @ b.float().T, 1 + a.double() @ b.double().T)


@pytest.mark.parametrize("device", ["h100", "a100"])
def test_every_byte_is_copied_once_per_tile(library, device):
    m, n, k = 128, 256, 256
    columns = 128 if CUTLASS and device == "h100" else 8  # of 16 rows, per warp and instruction
    a, b, c = values(m, k, BF16, 1), values(n, k, BF16, 2), torch.zeros(m, n)
    with runtime.record(device) as launches:
        library.call(
            name_of("nt", BF16, BF16), a=a, b=b, c=c, m=m, n=n, k=k, a_stride=k, b_stride=k
        )
    (report,) = launches
    assert report.mma == m * n * k // (16 * columns * 16)
    assert report.loaded_bytes("b") == report.unique_bytes("b") == b.nbytes
    assert report.loaded_bytes("a") == 2 * report.unique_bytes("a") == 2 * a.nbytes
    assert report.sector_efficiency("a") == report.sector_efficiency("b") == 1.0

"""Whole kernels of the kinds that ship, in small: the simulator runs them right and fast."""

import numpy as np
import pytest
from ptxsim.harness import compile_cuda, nvcc, run

pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc is missing")

SOURCE = r"""
#include <cuda_bf16.h>
#include <cstdint>
__device__ inline uint32_t sptr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ inline void copy16(void* to, const void* from, bool ok) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(sptr(to)), "l"(from),
               "r"(ok ? 16 : 0));
}
template <bool kTrans>
__device__ inline void load_matrix(uint32_t* r, const void* p) {
  if (kTrans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(sptr(p)));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(sptr(p)));
}
__device__ inline void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},"
               "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline uint32_t pack(float x, float y) {
  __nv_bfloat162 z = __floats2bfloat162_rn(x, y);
  return *(uint32_t*)&z;
}

// q [B,64,64], k and v [B,L,64], o [B,64,64]; three cp.async stages of 32 keys.
constexpr int kDim = 64, kKeys = 32, kStages = 3;
__device__ inline int at(int row, int chunk) { return row * kDim + ((chunk ^ (row & 7)) * 8); }

__global__ void __launch_bounds__(128) attention(const __nv_bfloat16* q, const __nv_bfloat16* k,
                                                 const __nv_bfloat16* v, float* o, int length,
                                                 float scale) {
  extern __shared__ __align__(128) __nv_bfloat16 smem[];
  __nv_bfloat16 *sq = smem, *sk = smem + 64 * kDim, *sv = sk + kStages * kKeys * kDim;
  int t = threadIdx.x, w = t / 32, l = t % 32;
  int64_t b = blockIdx.x;
  q += b * 64 * kDim, k += b * length * kDim, v += b * length * kDim, o += b * 64 * kDim;
  for (int i = t; i < 64 * 8; i += 128) copy16(sq + at(i / 8, i % 8), q + i * 8, true);
  int tiles = (length + kKeys - 1) / kKeys;
  auto load = [&](int j) {
    if (j < tiles)
      for (int i = t; i < kKeys * 8; i += 128) {
        int row = j * kKeys + i / 8, stage = j % kStages * kKeys * kDim;
        bool ok = row < length;
        int64_t from = (ok ? row : 0) * kDim + i % 8 * 8;
        copy16(sk + stage + at(i / 8, i % 8), k + from, ok);
        copy16(sv + stage + at(i / 8, i % 8), v + from, ok);
      }
    asm volatile("cp.async.commit_group;");
  };
  for (int j = 0; j < kStages - 1; j++) load(j);
  float acc[8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  uint32_t aq[4][4];
  for (int j = 0; j < tiles; j++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncthreads();
    load(j + kStages - 1);
    if (j == 0)
      for (int c = 0; c < 4; c++)
        load_matrix<false>(aq[c], sq + at(w * 16 + l % 16, c * 2 + l / 16));
    int stage = j % kStages * kKeys * kDim;
    const __nv_bfloat16 *tk = sk + stage, *tv = sv + stage;
    float s[4][4] = {};
    for (int c = 0; c < 4; c++)
      for (int n = 0; n < 4; n += 2) {
        uint32_t r[4];
        load_matrix<false>(r, tk + at(n * 8 + l % 8 + l / 16 * 8, c * 2 + l / 8 % 2));
        mma(s[n], aq[c], r[0], r[1]);
        mma(s[n + 1], aq[c], r[2], r[3]);
      }
    for (int h = 0; h < 2; h++) {
      float high = top[h], part = 0;
      for (int n = 0; n < 4; n++)
        for (int e = 0; e < 2; e++) {
          float& x = s[n][h * 2 + e];
          x = j * kKeys + n * 8 + l % 4 * 2 + e < length ? x * scale : -INFINITY;
          high = fmaxf(high, x);
        }
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
      float keep = exp2f(top[h] - high);
      top[h] = high;
      for (int n = 0; n < 4; n++)
        for (int e = 0; e < 2; e++) part += s[n][h * 2 + e] = exp2f(s[n][h * 2 + e] - high);
      sum[h] = sum[h] * keep + part;
      for (int n = 0; n < 8; n++) acc[n][h * 2] *= keep, acc[n][h * 2 + 1] *= keep;
    }
    for (int c = 0; c < 2; c++) {
      float *p = s[c * 2], *r = s[c * 2 + 1];
      uint32_t a[4] = {pack(p[0], p[1]), pack(p[2], p[3]), pack(r[0], r[1]), pack(r[2], r[3])};
      for (int n = 0; n < 8; n += 2) {
        uint32_t r[4];
        load_matrix<true>(r, tv + at(c * 16 + l % 16, n + l / 16));
        mma(acc[n], a, r[0], r[1]);
        mma(acc[n + 1], a, r[2], r[3]);
      }
    }
  }
  for (int h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    for (int n = 0; n < 8; n++)
      *(float2*)(o + (w * 16 + l / 4 + h * 8) * kDim + n * 8 + l % 4 * 2) =
          make_float2(acc[n][h * 2] / sum[h], acc[n][h * 2 + 1] / sum[h]);
  }
}

// The k-th largest of each row by radix select: a histogram per byte, highest byte first.
__global__ void __launch_bounds__(256) kth_largest(const float* x, float* y, int n, int k) {
  __shared__ unsigned histogram[256], chosen, remaining;
  const float* row = x + (int64_t)blockIdx.x * n;
  unsigned prefix = 0, mask = 0, want = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += 256) {
      unsigned u = __float_as_uint(row[i]);
      u ^= u >> 31 ? ~0u : 0x80000000u;
      if ((u & mask) == prefix) atomicAdd(&histogram[u >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      unsigned own[8], total = 0;
      for (int i = 0; i < 8; i++) total += own[i] = histogram[255 - (threadIdx.x * 8 + i)];
      unsigned upto = total;
      for (int d = 1; d < 32; d *= 2) {
        unsigned other = __shfl_up_sync(~0u, upto, d);
        if (threadIdx.x >= d) upto += other;
      }
      unsigned before = upto - total;
      if (before < want && want <= upto)
        for (int i = 0; i < 8; i++) {
          if (before + own[i] >= want) {
            chosen = 255 - (threadIdx.x * 8 + i), remaining = want - before;
            break;
          }
          before += own[i];
        }
    }
    __syncthreads();
    prefix |= chosen << shift, mask |= 255u << shift, want = remaining;
    __syncthreads();
  }
  prefix = prefix >> 31 ? prefix ^ 0x80000000u : ~prefix;
  if (threadIdx.x == 0) y[blockIdx.x] = __uint_as_float(prefix);
}

// CTAs that wait for each other: rounds of neighbour exchange behind a grid barrier.
__global__ void grid_rounds(float* x, unsigned* arrived, int rounds) {
  int n = gridDim.x;
  for (int r = 0; r < rounds; r++) {
    float v = x[(r & 1) * n + (blockIdx.x + 1) % n];
    if (threadIdx.x == 0) x[(~r & 1) * n + blockIdx.x] = v + 1;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1);
      while (*(volatile unsigned*)arrived < (r + 1) * n) {}
      __threadfence();
    }
    __syncthreads();
  }
}

// Decoupled look-back: each CTA publishes its sum, then adds up its predecessors'.
__global__ void running_sum(const int* x, int* y, volatile int* state, volatile int* value) {
  __shared__ int s[128], before;
  int b = blockIdx.x, t = threadIdx.x;
  s[t] = x[b * 128 + t];
  __syncthreads();
  for (int d = 1; d < 128; d *= 2) {
    int other = t >= d ? s[t - d] : 0;
    __syncthreads();
    s[t] += other;
    __syncthreads();
  }
  if (t == 0) {
    value[b] = s[127];
    __threadfence();
    state[b] = 1;
    int sum = 0;
    for (int p = b - 1; p >= 0; p--) {
      while (state[p] == 0) {}
      __threadfence();
      sum += value[p];
    }
    before = sum;
  }
  __syncthreads();
  y[b * 128 + t] = before + s[t];
}
"""
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def kernels(request):
    return compile_cuda(SOURCE, request.param)


def bf16(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and the same as f64."""
    bits = (RNG.standard_normal(shape).astype("f4").view("u4") >> 16).astype("u2")
    return bits, (bits.astype("u4") << 16).view("f4").astype("f8")


@pytest.mark.parametrize("batch, length, seed", [(3, 100, None), (1, 70, 1), (16, 512, None)])
def test_attention(kernels, batch: int, length: int, seed: int | None) -> None:
    (q, fq), (k, fk), (v, fv) = (
        bf16(batch, 64, 64),
        bf16(batch, length, 64),
        bf16(batch, length, 64),
    )
    o = np.zeros((batch, 64, 64), "f4")
    smem = 2 * (64 * 64 + 2 * 3 * 32 * 64)
    scale = float(0.125 / np.log(2))
    report = run(
        kernels, "attention", batch, 128, q, k, v, o, length, scale, dynamic_smem=smem, seed=seed
    )
    s = fq @ fk.swapaxes(1, 2) * 0.125
    p = np.exp(s - s.max(-1, keepdims=True))
    np.testing.assert_allclose(o, p / p.sum(-1, keepdims=True) @ fv, atol=8e-3)
    # What the design promises: every byte of q, k and v is read once, without bank conflicts.
    for name, x in (("arg0", q), ("arg1", k), ("arg2", v)):
        assert report.loaded_bytes(name) == report.unique_bytes(name) == x.nbytes
    assert report.bank_conflicts == 0
    tiles = -(-length // 32)
    assert report.mma == batch * tiles * 4 * (16 + 16)


@pytest.mark.parametrize("rows, n, seed", [(3, 1000, None), (1, 600, 1), (4, 32000, None)])
def test_radix_select(kernels, rows: int, n: int, seed: int | None) -> None:
    x, y = RNG.standard_normal((rows, n)).astype("f4"), np.zeros(rows, "f4")
    run(kernels, "kth_largest", rows, 256, x, y, n, 50, seed=seed)
    np.testing.assert_array_equal(y, np.sort(x, 1)[:, -50])


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_grid_barrier(kernels, seed: int | None) -> None:
    x = np.zeros(2 * 12, "f4")
    run(kernels, "grid_rounds", 12, 64, x, np.zeros(1, "u4"), 3, seed=seed)
    assert (x[12:] == 3).all() and (x[:12] == 2).all()


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_decoupled_look_back(kernels, seed: int | None) -> None:
    x = RNG.integers(0, 100, 9 * 128).astype("i4")
    y = np.zeros_like(x)
    run(kernels, "running_sum", 9, 128, x, y, np.zeros(9, "i4"), np.zeros(9, "i4"), seed=seed)
    np.testing.assert_array_equal(y, np.cumsum(x))

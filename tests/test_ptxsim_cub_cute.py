"""Code nobody wrote for the simulator: CUB primitives, cooperative groups and a CuTe GEMM."""

import numpy as np
import pytest
from ptxsim import errors, runtime
from ptxsim.harness import cutlass_headers, nvcc

pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc is missing")

CUB_SOURCE = r"""
#include <cub/block/block_load.cuh>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/block/block_store.cuh>
#include <cub/device/device_scan.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>

#define API extern "C" __attribute__((visibility("default")))
constexpr int kThreads = 128, kItems = 4, kTile = kThreads * kItems;

struct Larger {
  template <typename T> __device__ T operator()(T a, T b) const { return a < b ? b : a; }
};

template <cub::BlockReduceAlgorithm kAlgorithm>
__global__ void reduce(const int* x, int* sums, int* maxima, int valid) {
  using Reduce = cub::BlockReduce<int, kThreads, kAlgorithm>;
  __shared__ typename Reduce::TempStorage storage;
  const int value = x[blockIdx.x * kThreads + threadIdx.x];
  const int sum = Reduce(storage).Sum(value);
  __syncthreads();
  const int maximum = Reduce(storage).Reduce(value, Larger{}, valid);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    maxima[blockIdx.x] = maximum;
  }
}
API int run_reduce(const int* x, int* sums, int* maxima, int valid, int blocks, int algorithm) {
  auto kernel = reduce<cub::BLOCK_REDUCE_WARP_REDUCTIONS>;
  if (algorithm == 1) kernel = reduce<cub::BLOCK_REDUCE_RAKING>;
  if (algorithm == 2) kernel = reduce<cub::BLOCK_REDUCE_RAKING_COMMUTATIVE_ONLY>;
  kernel<<<blocks, kThreads>>>(x, sums, maxima, valid);
  return cudaGetLastError();
}

template <cub::BlockScanAlgorithm kAlgorithm>
__global__ void scan(const int* x, int* inclusive, int* exclusive, int* totals) {
  using Load = cub::BlockLoad<int, kThreads, kItems, cub::BLOCK_LOAD_WARP_TRANSPOSE>;
  using Store = cub::BlockStore<int, kThreads, kItems, cub::BLOCK_STORE_TRANSPOSE>;
  using Scan = cub::BlockScan<int, kThreads, kAlgorithm>;
  __shared__ union {
    typename Load::TempStorage load;
    typename Store::TempStorage store;
    typename Scan::TempStorage scan;
  } storage;
  int values[kItems], result[kItems], total;
  Load(storage.load).Load(x + blockIdx.x * kTile, values);
  __syncthreads();
  Scan(storage.scan).InclusiveSum(values, result, total);
  __syncthreads();
  Store(storage.store).Store(inclusive + blockIdx.x * kTile, result);
  __syncthreads();
  Scan(storage.scan).ExclusiveScan(values, result, -1000, Larger{});
  __syncthreads();
  Store(storage.store).Store(exclusive + blockIdx.x * kTile, result);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}
API int run_scan(const int* x, int* inclusive, int* exclusive, int* totals, int blocks,
                 int raking) {
  auto kernel = raking ? scan<cub::BLOCK_SCAN_RAKING> : scan<cub::BLOCK_SCAN_WARP_SCANS>;
  kernel<<<blocks, kThreads>>>(x, inclusive, exclusive, totals);
  return cudaGetLastError();
}

__global__ void sort(const float* keys, float* sorted, int* order) {
  using Sort = cub::BlockRadixSort<float, kThreads, kItems, int>;
  __shared__ typename Sort::TempStorage storage;
  float key[kItems];
  int value[kItems];
  for (int i = 0; i < kItems; ++i) {
    value[i] = threadIdx.x * kItems + i;
    key[i] = keys[blockIdx.x * kTile + value[i]];
  }
  Sort(storage).SortDescending(key, value);
  for (int i = 0; i < kItems; ++i) {
    sorted[blockIdx.x * kTile + threadIdx.x * kItems + i] = key[i];
    order[blockIdx.x * kTile + threadIdx.x * kItems + i] = value[i];
  }
}
API int run_sort(const float* keys, float* sorted, int* order, int blocks) {
  sort<<<blocks, kThreads>>>(keys, sorted, order);
  return cudaGetLastError();
}

__global__ void warps(const float* x, float* sums, float* prefix) {
  using Reduce = cub::WarpReduce<float, 16>;
  using Scan = cub::WarpScan<float>;
  __shared__ Reduce::TempStorage reduce[kThreads / 16];
  __shared__ Scan::TempStorage scan[kThreads / 32];
  const float value = x[threadIdx.x];
  const float sum = Reduce(reduce[threadIdx.x / 16]).Sum(value);
  if (threadIdx.x % 16 == 0) sums[threadIdx.x / 16] = sum;
  float running;
  Scan(scan[threadIdx.x / 32]).InclusiveSum(value, running);
  prefix[threadIdx.x] = running;
}
API int run_warps(const float* x, float* sums, float* prefix) {
  warps<<<1, kThreads>>>(x, sums, prefix);
  return cudaGetLastError();
}

// Decoupled look-back: a CTA waits for the one before it.
API int run_device_scan(const int* x, int* out, int n) {
  size_t bytes = 0;
  void* storage = nullptr;
  if (int error = cub::DeviceScan::InclusiveSum(storage, bytes, x, out, n)) return error;
  if (int error = cudaMalloc(&storage, bytes)) return error;
  if (int error = cub::DeviceScan::InclusiveSum(storage, bytes, x, out, n)) return error;
  return cudaFree(storage);
}
"""


@pytest.fixture(scope="module")
def cub():
    return runtime.compile(CUB_SOURCE)


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("algorithm", [0, 1, 2])
def test_cub_block_reduce(cub, rng, algorithm):
    x = rng.integers(-1000, 1000, (3, 128), dtype=np.int32)
    sums, maxima = np.zeros(3, np.int32), np.zeros(3, np.int32)
    call = dict(x=x, sums=sums, maxima=maxima, valid=77, blocks=3, algorithm=algorithm)
    assert cub.call("run_reduce", **call) == 0
    assert np.array_equal(sums, x.sum(1)) and np.array_equal(maxima, x[:, :77].max(1))


@pytest.mark.parametrize("raking", [0, 1])
@pytest.mark.parametrize("seed", [None, 1])
def test_cub_block_scan(cub, rng, raking, seed):
    x = rng.integers(-1000, 1000, (2, 512), dtype=np.int32)
    inclusive, exclusive, totals = np.zeros_like(x), np.zeros_like(x), np.zeros(2, np.int32)
    with runtime.record(seed=seed):
        error = cub.call(
            "run_scan",
            x=x,
            inclusive=inclusive,
            exclusive=exclusive,
            totals=totals,
            blocks=2,
            raking=raking,
        )
    assert error == 0
    before = np.concatenate([np.full((2, 1), -1000), x[:, :-1]], 1)
    assert np.array_equal(inclusive, x.cumsum(1))
    assert np.array_equal(exclusive, np.maximum.accumulate(before, 1))
    assert np.array_equal(totals, x.sum(1))


def test_cub_block_radix_sort(cub, rng):
    keys = rng.normal(size=(2, 512)).astype(np.float32)
    keys[:, ::7] = keys[:, 1::7][:, : keys[:, ::7].shape[1]].mean()  # ties keep their order
    keys[0, :3] = np.inf, -np.inf, -0.0
    sorted_keys, order = np.zeros_like(keys), np.zeros(keys.shape, np.int32)
    assert cub.call("run_sort", keys=keys, sorted=sorted_keys, order=order, blocks=2) == 0
    expected = np.argsort(-keys, axis=1, kind="stable")
    assert np.array_equal(order, expected)
    assert np.array_equal(sorted_keys, np.take_along_axis(keys, expected, 1))


def test_cub_warp_primitives(cub, rng):
    x = rng.integers(-8, 8, 128).astype(np.float32)  # sums are exact
    sums, prefix = np.zeros(8, np.float32), np.zeros(128, np.float32)
    assert cub.call("run_warps", x=x, sums=sums, prefix=prefix) == 0
    assert np.array_equal(sums, x.reshape(8, 16).sum(1))
    assert np.array_equal(prefix, x.reshape(4, 32).cumsum(1).ravel())


@pytest.mark.parametrize("seed", [None, 5])
def test_cub_device_scan(cub, rng, seed):
    x = rng.integers(-1000, 1000, 20_001, dtype=np.int32)
    out = np.zeros_like(x)
    with runtime.record(seed=seed) as launches:
        assert cub.call("run_device_scan", x=x, out=out, n=x.size) == 0
    assert np.array_equal(out, x.cumsum())
    assert launches[-1].unique_bytes("x") == x.nbytes


GROUPS_SOURCE = r"""
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
namespace cg = cooperative_groups;

__global__ void collectives(const int* x, int* out, int n) {
  const int lane = threadIdx.x;
  const int v = x[lane];
  int row = 0;
  auto put = [&](int value) { out[row++ * 32 + lane] = value; };
  put(__shfl_xor_sync(~0u, v, 5));
  put(__shfl_up_sync(~0u, v, 3, 16));
  put(__shfl_down_sync(~0u, v, 2, 8));
  put(__shfl_sync(~0u, v, lane * 7, 8));
  put(__ballot_sync(~0u, v & 1));
  put(__any_sync(~0u, v == x[4]) + 2 * __all_sync(~0u, v < 16));
  put(__match_any_sync(~0u, v & 3));
  put(__reduce_add_sync(~0u, v));
  put(__reduce_min_sync(~0u, v));
  put(__reduce_xor_sync(~0u, v));
  put(__popc(__activemask()));
  auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  auto tile = cg::tiled_partition<8>(warp);
  put(cg::reduce(tile, v, cg::plus<int>()));
  put(cg::exclusive_scan(tile, v, cg::plus<int>()));
  put(tile.shfl(v, 3));
  int odd = -1;
  if (v & 1) {  // a collective of the lanes that came here
    auto here = cg::coalesced_threads();
    odd = here.thread_rank() + 100 * here.size() + 10000 * here.shfl(v, 0);
  }
  put(odd);
  put(__reduce_max_sync(~0u, odd));
}
extern "C" int run(const int* x, int* out) {
  collectives<<<1, 32>>>(x, out, 32);
  return cudaGetLastError();
}
"""


def test_warp_collectives_and_cooperative_groups(rng):
    x = rng.integers(0, 16, 32, dtype=np.int32)
    out = np.zeros((16, 32), np.int32)
    assert runtime.compile(GROUPS_SOURCE).call("run", x=x, out=out) == 0
    lane = np.arange(32)
    tiles = x.reshape(4, 8)
    odd = x & 1 == 1
    ranks = odd.cumsum() - 1 + 100 * odd.sum() + 10000 * x[odd][0]
    expected = [
        x[lane ^ 5],
        np.where(lane % 16 >= 3, x[lane - 3], x),
        np.where(lane % 8 < 6, x[(lane + 2) % 32], x),
        x[lane // 8 * 8 + lane * 7 % 8],
        np.packbits(odd, bitorder="little").view(np.int32)[0],
        3,
        [np.packbits(x & 3 == v & 3, bitorder="little").view(np.int32)[0] for v in x],
        x.sum(),
        x.min(),
        np.bitwise_xor.reduce(x),
        32,
        np.repeat(tiles.sum(1), 8),
        (tiles.cumsum(1) - tiles).ravel(),
        np.repeat(tiles[:, 3], 8),
        np.where(odd, ranks, -1),
        ranks[odd].max(),
    ]
    for row, want in enumerate(expected):
        assert np.array_equal(out[row], np.broadcast_to(want, 32)), row


GEMM_SOURCE = r"""
#include <cute/tensor.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/copy_atom.hpp>
using namespace cute;

// C[m, n] = sum_k A[m, k] B[n, k]: two cp.async stages, ldmatrix, mma.m16n8k16.
template <typename T, typename Atom>
struct Gemm {
  using M = _64; using N = _64; using K = _32;
  using Smem = decltype(composition(Swizzle<2, 3, 3>{},
                                    Layout<Shape<_64, _32, _2>, Stride<_32, _1, _2048>>{}));
  using Mma = TiledMMA<MMA_Atom<Atom>, Layout<Shape<_2, _2, _1>>, Tile<_32, _32, _16>>;
  using GmemCopy = decltype(make_tiled_copy(
      Copy_Atom<SM80_CP_ASYNC_CACHEGLOBAL<uint128_t>, T>{},
      Layout<Shape<_32, _4>, Stride<_4, _1>>{}, Layout<Shape<_1, _8>>{}));
  using SmemCopy = Copy_Atom<SM75_U32x4_LDSM_N, T>;
};

template <typename T, typename Atom>
__global__ void __launch_bounds__(128) gemm(const T* a, const T* b, float* c, int m, int n, int k,
                                             int pending) {
  using G = Gemm<T, Atom>;
  extern __shared__ __align__(128) char storage[];
  Tensor A = make_tensor(make_gmem_ptr(a), make_shape(m, k), make_stride(k, _1{}));
  Tensor B = make_tensor(make_gmem_ptr(b), make_shape(n, k), make_stride(k, _1{}));
  Tensor C = make_tensor(make_gmem_ptr(c), make_shape(m, n), make_stride(n, _1{}));
  auto tile = make_shape(typename G::M{}, typename G::N{}, typename G::K{});
  auto where = make_coord(blockIdx.x, blockIdx.y, _);
  Tensor gA = local_tile(A, tile, where, Step<_1, X, _1>{});
  Tensor gB = local_tile(B, tile, where, Step<X, _1, _1>{});
  Tensor gC = local_tile(C, tile, where, Step<_1, _1, X>{});
  T* smem = reinterpret_cast<T*>(storage);
  Tensor sA = make_tensor(make_smem_ptr(smem), typename G::Smem{});
  Tensor sB = make_tensor(make_smem_ptr(smem + cosize(typename G::Smem{})), typename G::Smem{});

  typename G::GmemCopy load;
  auto thread_load = load.get_thread_slice(threadIdx.x);
  Tensor fromA = thread_load.partition_S(gA);
  Tensor toA = thread_load.partition_D(sA);
  Tensor fromB = thread_load.partition_S(gB);
  Tensor toB = thread_load.partition_D(sB);

  typename G::Mma mma;
  auto thread_mma = mma.get_thread_slice(threadIdx.x);
  Tensor rA = thread_mma.partition_fragment_A(sA(_, _, 0));
  Tensor rB = thread_mma.partition_fragment_B(sB(_, _, 0));
  Tensor cC = thread_mma.partition_C(gC);
  Tensor rC = thread_mma.make_fragment_C(cC);
  clear(rC);
  auto copyA = make_tiled_copy_A(typename G::SmemCopy{}, mma);
  auto copyB = make_tiled_copy_B(typename G::SmemCopy{}, mma);
  auto threadA = copyA.get_thread_slice(threadIdx.x);
  auto threadB = copyB.get_thread_slice(threadIdx.x);
  Tensor lA = threadA.partition_S(sA);
  Tensor vA = threadA.retile_D(rA);
  Tensor lB = threadB.partition_S(sB);
  Tensor vB = threadB.retile_D(rB);

  const int tiles = size<2>(gA);
  auto fetch = [&](int t) {
    if (t < tiles) {
      copy(load, fromA(_, _, _, t), toA(_, _, _, t % 2));
      copy(load, fromB(_, _, _, t), toB(_, _, _, t % 2));
    }
    cp_async_fence();
  };
  fetch(0);
  for (int t = 0; t < tiles; ++t) {
    fetch(t + 1);
    if (pending == 1) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<2>();
    }
    __syncthreads();
    copy(copyA, lA(_, _, _, t % 2), vA);
    copy(copyB, lB(_, _, _, t % 2), vB);
    cute::gemm(mma, rA, rB, rC);
    __syncthreads();
  }
  copy(rC, cC);
}

// `pending` copies may be under way when a tile is read: 1 is right, 2 is a bug.
extern "C" int run(const half_t* a, const half_t* b, float* c, int m, int n, int k, int pending) {
  using Atom = SM80_16x8x16_F32F16F16F32_TN;
  constexpr int kSmem = 2 * cosize_v<typename Gemm<half_t, Atom>::Smem> * sizeof(half_t);
  gemm<half_t, Atom><<<dim3(m / 64, n / 64), 128, kSmem>>>(a, b, c, m, n, k, pending);
  return cudaGetLastError();
}
"""


@pytest.fixture(scope="module")
def cute():
    include = cutlass_headers()
    if include is None:
        pytest.skip("needs the nvidia-cutlass package")
    return runtime.compile(GEMM_SOURCE, archs=("80",), flags=(f"-I{include}",))


def run_gemm(lib: runtime.Library, a: np.ndarray, b: np.ndarray, pending: int) -> np.ndarray:
    (m, k), n = a.shape, b.shape[0]
    c = np.zeros((m, n), np.float32)
    a, b = a.astype(np.float16), b.astype(np.float16)
    assert lib.call("run", a=a, b=b, c=c, m=m, n=n, k=k, pending=pending) == 0
    return c


@pytest.mark.parametrize("device", ["a100", "h100"])
def test_cute_gemm(cute, rng, device):
    m, n, k = 128, 64, 160
    a, b = rng.integers(-8, 9, (m, k)), rng.integers(-8, 9, (n, k))
    with runtime.record(device) as launches:
        c = run_gemm(cute, a, b, pending=1)
    assert np.array_equal(c, a @ b.T)
    (report,) = launches
    assert report.mma == m * n * k // (16 * 8 * 16)
    assert report.bank_conflicts == 0  # the swizzle
    # Each CTA loads its own rows once: two CTAs along m share b.
    assert report.loaded_bytes("a") == report.unique_bytes("a") == a.size * 2
    assert report.loaded_bytes("b") == 2 * report.unique_bytes("b") == 2 * b.size * 2


def test_cute_gemm_that_does_not_wait(cute, rng):
    a, b = rng.integers(1, 9, (64, 64)), rng.integers(1, 9, (64, 64))
    with pytest.raises(errors.SharedRace, match=r"cp\.async"):
        run_gemm(cute, a, b, pending=2)
    # With the checks off the copies still come late, so the result is wrong.
    with runtime.record(checks=runtime.Checks(races=False, uninitialized=False)):
        assert not np.array_equal(run_gemm(cute, a, b, pending=2), a @ b.T)

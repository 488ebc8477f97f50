// The projections for more than 64 rows: the tiled product of gemm.cuh with an operator's epilogue.
//
// Gathering, norm and concatenation come first, in a launch of their own that writes the rows as
// the product wants them: done inside it, every column tile would repeat them for its rows. They
// are skipped where the rows can be read as they are. CTAs that share a tile of weights are
// neighbours in the grid, so the weights come from memory about once and from L2 after that.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/common/gemm.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/weight_stream.cuh"

namespace mtp::cuda {

struct PackParams {
  Segment segments[2];
  void* out;  // [rows, out_stride]
  int64_t out_stride;
  int segment_count;
  float eps, norm_offset;
};

// One CTA per row.
template <typename T>
__global__ void __launch_bounds__(kStreamThreads) pack_rows_kernel(const PackParams p) {
  __shared__ float scratch[2][kStreamThreads / kWarp];
  T* out = static_cast<T*>(p.out) + blockIdx.x * p.out_stride;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i == p.segment_count) break;
    const Segment& segment = p.segments[i];
    const int64_t start = start_of_row(segment, blockIdx.x);
    float factor = 1.0f;
    float x[8];
    if (segment.norm_weight) {
      float squares = 0.0f;
      for (int64_t k = threadIdx.x * 8; start >= 0 && k < segment.length; k += kStreamThreads * 8) {
        widen_raw(segment.dtype, load_raw(segment, start + k), x);
#pragma unroll
        for (int j = 0; j < 8; ++j) squares = fmaf(x[j], x[j], squares);
      }
      squares = block_sum<kStreamThreads>(squares, scratch[i]);
      factor = rms_factor(squares, segment.length, p.eps);
    }
    for (int64_t k = threadIdx.x * 8; k < segment.length; k += kStreamThreads * 8) {
      widen_raw(segment.dtype, start >= 0 ? load_raw(segment, start + k) : RawPiece{}, x);
      if (segment.norm_weight) {
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] *= factor;
        scale_by_norm_weight(segment, k, p.norm_offset, x);
      }
#pragma unroll
      for (int first = 0; first < 8; first += Pack<T>::kSize) {
        Pack<T> pack;
#pragma unroll
        for (int j = 0; j < Pack<T>::kSize; ++j) pack.values[j] = from_float<T>(x[first + j]);
        store_pack(out + k + first, pack);
      }
    }
    out += segment.length;
  }
}

// The dtype rows are multiplied in.
inline DType large_dtype(DType x_dtype, DType weight_dtype) {
  if (x_dtype == weight_dtype) return x_dtype;
  const bool exact = weight_dtype == DType::kI8 || weight_dtype == DType::kF8E4M3;
  return x_dtype == DType::kBF16 && exact ? DType::kBF16 : DType::kF32;
}

template <typename A, typename B>
struct LargeParams {
  Matrix<A> a;  // [m, k]
  Matrix<B> b;  // [n, k]
  int64_t k, k_per_split;
};

// grid: row tiles, stripes of column tiles, parts of k.
template <typename A, typename B, typename Epilogue>
__global__ void __launch_bounds__(256, sizeof(A) == 4 || sizeof(B) == 4 ? 1 : 2)
    large_m_kernel(const LargeParams<A, B> p, const typename Epilogue::Params e) {
  using G = Gemm<A, Order::kInner, B, Order::kInner>;
  static_assert(G::kThreads == kStreamThreads && G::kTile == kStreamTile,
                "the epilogues serve both kernels");
  extern __shared__ __align__(1024) unsigned char aligned_smem[];
  float* const tile_smem = reinterpret_cast<float*>(aligned_smem);
  const int first = blockIdx.x * G::kTile;
  const int rows = static_cast<int>(min(p.a.extent - first, static_cast<int64_t>(G::kTile)));
  const int tiles = static_cast<int>((p.b.extent + G::kTile - 1) / G::kTile);
  const int64_t k_begin = blockIdx.z * p.k_per_split;
  Epilogue epilogue(e, reinterpret_cast<float*>(aligned_smem + G::kSmemBytes), blockIdx.y, first,
                    rows);
  for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    typename G::Accumulator acc = {};
    G::multiply(p.a, first, p.b, static_cast<int64_t>(tile) * G::kTile, k_begin,
                min(p.k, k_begin + p.k_per_split), aligned_smem, acc);
    G::store_tile(acc, tile_smem);
    __syncthreads();
    epilogue.take({tile_smem, G::kTilePitch, nullptr, tile, static_cast<int>(blockIdx.z),
                   static_cast<int>(blockIdx.x) * tiles + tile, first, rows});
    __syncthreads();
  }
  epilogue.finish();
}

// rows x k activations against n x k weights.
struct LargeProblem {
  Segment segments[2];  // what a row is made of
  int segment_count;
  const void* weight;
  void* packed;  // packed_bytes()
  int64_t rows, n, k, weight_stride;
  DType dtype, weight_dtype;  // dtype: large_dtype of the finest source
  float eps, norm_offset;

  int row_tiles() const { return static_cast<int>(ceil_div<int64_t>(rows, kStreamTile)); }
  int tiles() const { return static_cast<int>(ceil_div<int64_t>(n, kStreamTile)); }
  int64_t packed_bytes() const { return align_256(rows * k * dtype_bytes(dtype)); }
};

// kOneByte: whether one-byte weights may come.
template <typename Epilogue, bool kOneByte>
void launch_large(const LargeProblem& p, const typename Epilogue::Params& e, int stripes,
                  int splits, int64_t k_per_split, int64_t epilogue_bytes, cudaStream_t stream,
                  const char* op) {
  const Segment& only = p.segments[0];
  const void* a = only.data;
  int64_t a_stride = only.stride;
  if (p.segment_count > 1 || only.norm_weight || only.ids || only.dtype != p.dtype ||
      !only.aligned) {
    PackParams pack = {};
    pack.segments[0] = p.segments[0];
    pack.segments[1] = p.segments[1];
    pack.segment_count = p.segment_count;
    pack.out = p.packed;
    pack.out_stride = p.k;
    pack.eps = p.eps;
    pack.norm_offset = p.norm_offset;
    with_float_type(p.dtype, [&](auto t) {
      pack_rows_kernel<decltype(t)>
          <<<static_cast<unsigned>(p.rows), kStreamThreads, 0, stream>>>(pack);
    });
    check_launch(op);
    a = p.packed;
    a_stride = p.k;
  }
  const auto run = [&](auto of_a, auto of_b) {
    using A = decltype(of_a);
    using B = decltype(of_b);
    LargeParams<A, B> params;
    params.a = {static_cast<const A*>(a), a_stride, p.rows};
    params.b = {static_cast<const B*>(p.weight), p.weight_stride, p.n};
    params.k = p.k;
    params.k_per_split = k_per_split;
    const auto kernel = large_m_kernel<A, B, Epilogue>;
    const int smem =
        Gemm<A, Order::kInner, B, Order::kInner>::kSmemBytes + static_cast<int>(epilogue_bytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem), op);
    const dim3 grid(p.row_tiles(), stripes, splits);
    kernel<<<grid, kStreamThreads, smem, stream>>>(params, e);
    check_launch(op);
  };
  using BF16 = __nv_bfloat16;
  const bool wide = p.dtype == DType::kF32;
  switch (p.weight_dtype) {
    case DType::kBF16:
      return wide ? run(float{}, BF16{}) : run(BF16{}, BF16{});
    case DType::kF16:
      return wide ? run(float{}, __half{}) : run(__half{}, __half{});
    case DType::kF32:
      return run(float{}, float{});
    case DType::kI8:
      if constexpr (kOneByte) {
        return wide ? run(float{}, int8_t{}) : run(BF16{}, int8_t{});
      }
      break;
    case DType::kF8E4M3:
      if constexpr (kOneByte) {
        return wide ? run(float{}, __nv_fp8_e4m3{}) : run(BF16{}, __nv_fp8_e4m3{});
      }
      break;
    default:
      break;
  }
  throw std::runtime_error(std::string(op) + ": unsupported weight dtype");
}

}  // namespace mtp::cuda

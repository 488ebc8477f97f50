// The projections for more than 64 rows: the tiled product of gemm.cuh with an operator's epilogue.
//
// Rows are gathered, concatenated and normalised on their way into the product: every piece is
// copied from where its row lies, and the thread that has copied it multiplies it, in shared
// memory, by the row's factor and the norm's weight before the tensor cores read it. That is
// repeated for every column tile, but the rows never go to memory in between. A factor needs a
// whole row, so a launch before leaves one float per row and norm; rows that cannot be copied in
// pieces of 16 bytes, or have a dtype that the product does not take, are rewritten by the same
// launch.
//
// CTAs that share a tile of weights are neighbours in the grid, so the weights come from memory
// about once and from L2 after that.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/common/gemm.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/weight_stream.cuh"

namespace mtp::cuda {

struct PrepareParams {
  Segment segments[2];
  float* factors;  // [segments, rows]
  void* out;       // [rows, out_stride], or null
  int64_t out_stride;
  int segment_count;
  float eps;
};

// Norms' factors of a row, and the row itself, widened to T, if there is an `out`. One CTA per row.
template <typename T>
__global__ void __launch_bounds__(kStreamThreads) prepare_rows_kernel(const PrepareParams p) {
  __shared__ float scratch[2][kStreamThreads / kWarp];
  T* out = static_cast<T*>(p.out) + blockIdx.x * p.out_stride;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i == p.segment_count) break;
    const Segment& segment = p.segments[i];
    if (!segment.norm_weight && !p.out) continue;
    const int64_t start = start_of_row(segment, blockIdx.x);
    float squares = 0.0f;
    for (int64_t k = threadIdx.x * 8; k < segment.length; k += kStreamThreads * 8) {
      float x[8];
      widen_raw(segment.dtype, start >= 0 ? load_raw(segment, start + k) : RawPiece{}, x);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares = fmaf(x[j], x[j], squares);
      if (!p.out) continue;
#pragma unroll
      for (int first = 0; first < 8; first += Pack<T>::kSize) {
        Pack<T> pack;
#pragma unroll
        for (int j = 0; j < Pack<T>::kSize; ++j) pack.values[j] = from_float<T>(x[first + j]);
        store_pack(out + k + first, pack);
      }
    }
    out += segment.length;
    if (!segment.norm_weight) continue;
    squares = block_sum<kStreamThreads>(squares, scratch[i]);
    if (threadIdx.x == 0) {
      p.factors[static_cast<int64_t>(i) * gridDim.x + blockIdx.x] =
          rms_factor(squares, segment.length, p.eps);
    }
  }
}

struct RowParams {
  Segment segments[2];
  const float* factors;  // [segments, rows]; of a segment without a norm they are not read
  int64_t rows;
  int segment_count;
  float norm_offset;
};

// What a CTA knows of its rows.
struct RowTable {
  float factor[kStreamTile][2];  // [rows, segments]
  int index[kStreamTile][2];     // of the row in memory; negative where it is zero or missing

  __device__ __forceinline__ void fill(const RowParams& p, int64_t first) {
    for (int i = threadIdx.x; i < 2 * kStreamTile; i += kStreamThreads) {
      const int row = i / 2, s = i % 2;
      if (s >= p.segment_count) continue;
      const Segment& segment = p.segments[s];
      const int64_t m = first + row;
      const bool present = m < p.rows && start_of_row(segment, m) >= 0;
      const int64_t at = present && segment.ids ? load_index(segment.id_dtype, segment.ids, m) : m;
      index[row][s] = present ? static_cast<int>(at) : -1;
      factor[row][s] = present && segment.norm_weight ? p.factors[s * p.rows + m] : 0.0f;
    }
  }
};

// The left operand of Gemm::multiply. A thread's pieces of a stage are all in the same columns.
template <typename A, typename Stage>
struct LargeRows {
  static constexpr int kPiece = Stage::kPiece;

  const RowParams& p;
  const RowTable& table;

  // Of this thread's pieces at step k.
  struct Place {
    int s;       // segment
    int64_t at;  // in it
    bool valid;
  };

  __device__ __forceinline__ Place place(int64_t k, int64_t k_end) const {
    k += threadIdx.x % Stage::kColumns * kPiece;
    const bool second = p.segment_count > 1 && k >= p.segments[0].length;
    return {second, second ? k - p.segments[0].length : k, k < k_end};
  }

  __device__ __forceinline__ void load(uint32_t to, int64_t k, int64_t k_end) const {
    const Place here = place(k, k_end);
    const Segment& segment = p.segments[here.s];
    const A* const data = static_cast<const A*>(segment.data);
    Stage::each_piece([&](int row, int column) {
      const int index = table.index[row][here.s];
      const bool valid = here.valid && index >= 0;
      copy16(to + Stage::offset(row, column),
             valid ? data + index * segment.stride + here.at : data, valid);
    });
  }

  __device__ __forceinline__ void finish(unsigned char* stage, int64_t k, int64_t k_end) const {
    const Place here = place(k, k_end);
    const Segment& segment = p.segments[here.s];
    if (!segment.norm_weight || !here.valid) return;
    float weight[kPiece];
    load_norm_weight(segment, here.at, p.norm_offset, weight);
    Stage::each_piece([&](int row, int column) {
      A* const piece = reinterpret_cast<A*>(stage + Stage::offset(row, column));
      const float factor = table.factor[row][here.s];
      Pack<A> pack = load_pack(piece);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        pack.values[j] = from_float<A>(to_float(pack.values[j]) * factor * weight[j]);
      }
      store_pack(piece, pack);
    });
  }
};

// The dtype rows are multiplied in.
inline DType large_dtype(DType x_dtype, DType weight_dtype) {
  if (x_dtype == weight_dtype) return x_dtype;
  const bool exact = weight_dtype == DType::kI8 || weight_dtype == DType::kF8E4M3;
  return x_dtype == DType::kBF16 && exact ? DType::kBF16 : DType::kF32;
}

template <typename B>
struct LargeParams {
  RowParams rows;  // [rows, k]
  Matrix<B> b;     // [n, k]
  int64_t k, k_per_split;
};

// grid: row tiles, stripes of column tiles, parts of k.
template <typename A, typename B, typename Epilogue>
__global__ void __launch_bounds__(256, sizeof(A) == 4 || sizeof(B) == 4 ? 1 : 2)
    large_m_kernel(const LargeParams<B> p, const typename Epilogue::Params e) {
  using G = Gemm<A, Order::kInner, B, Order::kInner>;
  static_assert(G::kThreads == kStreamThreads && G::kTile == kStreamTile,
                "the epilogues serve both kernels");
  extern __shared__ __align__(1024) unsigned char aligned_smem[];
  __shared__ RowTable table;
  float* const tile_smem = reinterpret_cast<float*>(aligned_smem);
  const int first = blockIdx.x * G::kTile;
  const int rows = static_cast<int>(min(p.rows.rows - first, static_cast<int64_t>(G::kTile)));
  const int tiles = static_cast<int>((p.b.extent + G::kTile - 1) / G::kTile);
  const int64_t k_begin = blockIdx.z * p.k_per_split;
  Epilogue epilogue(e, reinterpret_cast<float*>(aligned_smem + G::kSmemBytes), blockIdx.y, first,
                    rows);
  table.fill(p.rows, first);
  __syncthreads();
  for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    typename G::Accumulator acc = {};
    G::multiply(LargeRows<A, typename G::StageA>{p.rows, table}, p.b,
                static_cast<int64_t>(tile) * G::kTile, k_begin, min(p.k, k_begin + p.k_per_split),
                aligned_smem, acc);
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
  void* prepared;  // prepared_bytes(): factors, then rows
  int64_t rows, n, k, weight_stride;
  DType dtype, weight_dtype;  // dtype: large_dtype of the finest source
  float eps, norm_offset;

  int row_tiles() const { return static_cast<int>(ceil_div<int64_t>(rows, kStreamTile)); }
  int tiles() const { return static_cast<int>(ceil_div<int64_t>(n, kStreamTile)); }

  // Whether the product can copy the rows from where they are.
  bool in_place() const {
    const auto fits = [&](const Segment& s) { return s.dtype == dtype && s.aligned; };
    return fits(segments[0]) && (segment_count == 1 || fits(segments[1]));
  }
  int64_t factor_bytes() const { return align_256(segment_count * rows * 4); }
  int64_t prepared_bytes() const {
    return factor_bytes() + (in_place() ? 0 : align_256(rows * k * dtype_bytes(dtype)));
  }
};

// kOneByte: whether one-byte weights may come.
template <typename Epilogue, bool kOneByte>
void launch_large(const LargeProblem& p, const typename Epilogue::Params& e, int stripes,
                  int splits, int64_t k_per_split, int64_t epilogue_bytes, cudaStream_t stream,
                  const char* op) {
  RowParams rows = {};
  rows.segments[0] = p.segments[0];
  rows.segments[1] = p.segments[1];
  rows.segment_count = p.segment_count;
  rows.factors = static_cast<const float*>(p.prepared);
  rows.rows = p.rows;
  rows.norm_offset = p.norm_offset;
  if (p.segments[0].norm_weight || p.segments[1].norm_weight || !p.in_place()) {
    PrepareParams prepare = {};
    prepare.segments[0] = p.segments[0];
    prepare.segments[1] = p.segments[1];
    prepare.segment_count = p.segment_count;
    prepare.factors = static_cast<float*>(p.prepared);
    prepare.eps = p.eps;
    if (!p.in_place()) {
      char* to = static_cast<char*>(p.prepared) + p.factor_bytes();
      prepare.out = to;
      prepare.out_stride = p.k;
      for (int i = 0; i < p.segment_count; ++i) {
        Segment& segment = rows.segments[i];
        segment.data = to;
        segment.stride = p.k;
        segment.ids = segment.positions = nullptr;
        to += segment.length * dtype_bytes(p.dtype);
      }
    }
    with_float_type(p.dtype, [&](auto t) {
      prepare_rows_kernel<decltype(t)>
          <<<static_cast<unsigned>(p.rows), kStreamThreads, 0, stream>>>(prepare);
    });
    check_launch(op);
  }
  const auto run = [&](auto of_a, auto of_b) {
    using A = decltype(of_a);
    using B = decltype(of_b);
    LargeParams<B> params;
    params.rows = rows;
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

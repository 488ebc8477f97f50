// The core of skinny_linear, head_topk and eh_proj for up to 64 activation rows at a time.
//
// A decoding step multiplies a large weight matrix with a few rows, so the time is that of reading
// the weights once. They are the A operand (rows = 16 weight rows of a warp), the activations the
// B operand (columns = activation rows, padded to 8, 16, 32 or 64) of mma.sync m16n8k16.
//
// A CTA of 8 warps takes tiles of 128 weight rows, 128 bytes of each row per pipeline stage. In a
// product the order of k is free as long as both operands agree on it, so a thread owns the 16-byte
// pieces it copies: lane t of a quad holds k = t * kPiece .. of every group of four pieces. Weights
// therefore go from memory to their stage and on into registers without ever crossing threads, the
// same way for 1, 2 and 4-byte dtypes, and are widened in registers. A stage also takes the
// matching activations, swizzled so that fragments are read without bank conflicts. The pipeline
// runs on across tiles, so a persistent CTA never drains it.
//
// Activations are packed by pack_rows_kernel beforehand: gathered, normalised in f32, then rounded
// to the operand type C, or split exactly into two (f16) or three (f32) bf16 summands; likewise
// f16 and f32 weights meeting bf16 operands. Products of summands whose size is below f32's
// rounding are left out. tf32 would keep only 11 of 24 bits.
//
// Each sum runs over ascending stages, pieces and summands in f32, whatever the number of rows, so
// a row's bits do not depend on it. With few tiles, k is split over the grid at places that depend
// on N and K only; a second kernel adds the parts in order.
//
// Shared memory, bf16: 72, 80, 97 and 105 KB at 8, 16, 32 and 64 rows, of which 64 KB (three stages
// at 64 rows: 48 KB) are weights under way. Registers on sm_90a, no spills: at most 116, 120, 128
// and 210 behind a linear layer, 82, 87, 126 and 189 behind head_topk; f32 weights need most.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/common/async_copy.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/operand.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "mtp/types.h"

namespace mtp::cuda {

constexpr int kStreamThreads = 256;
constexpr int kStreamTile = 128;                      // weight rows per CTA
constexpr int kTilePitch = kStreamTile + 4;           // floats between rows of a finished tile
constexpr int kStageWeightBytes = kStreamTile * 128;  // per stage
constexpr int kMaxStreamRows = 64;                    // activation rows per pass over the weights
constexpr int stream_stages(int blocks) { return blocks > 4 ? 3 : 4; }

// ---- run-time element types ------------------------------------------------------------------

__device__ __forceinline__ float load_as(DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case DType::kF16:
      return to_float(static_cast<const __half*>(p)[i]);
    case DType::kBF16:
      return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

__device__ __forceinline__ void store_as(DType dtype, void* p, int64_t i, float x) {
  switch (dtype) {
    case DType::kF16:
      static_cast<__half*>(p)[i] = from_float<__half>(x);
      break;
    case DType::kBF16:
      static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(x);
      break;
    default:
      static_cast<float*>(p)[i] = x;
  }
}

// ---- activations -----------------------------------------------------------------------------

// A stretch of an activation row: row m of `data`, or, with `ids`, row ids[m], which counts as
// zero where it is outside [0, limit) or positions[m] is 0. Normalised if there is a norm_weight.
struct Segment {
  const void* data;
  const void* norm_weight;  // norm_dtype, or null
  const void* ids;          // or null
  const void* positions;    // or null
  int64_t stride, length, limit;
  DType dtype, norm_dtype, id_dtype, position_dtype;
};

struct PackParams {
  Segment segments[2];
  void* out;  // [pieces][rows][out_stride]
  int64_t out_stride;
  int segment_count, rows, pieces;
  float eps, norm_offset;
};

__device__ __forceinline__ int64_t load_index(DType dtype, const void* p, int64_t i) {
  return dtype == DType::kI32 ? static_cast<const int32_t*>(p)[i]
                              : static_cast<const int64_t*>(p)[i];
}

// One CTA per row.
template <typename C>
__global__ void __launch_bounds__(kStreamThreads) pack_rows_kernel(const PackParams p) {
  __shared__ float scratch[2][kStreamThreads / kWarp];
  const int m = blockIdx.x;
  C* out = static_cast<C*>(p.out) + m * p.out_stride;
  const int64_t piece_stride = p.rows * p.out_stride;
  int64_t base = 0;
  for (int s = 0; s < p.segment_count; ++s) {
    const Segment& segment = p.segments[s];
    int64_t row = m;
    bool known = true;
    if (segment.ids) {
      row = load_index(segment.id_dtype, segment.ids, m);
      known = row >= 0 && row < segment.limit;
      if (segment.positions && load_index(segment.position_dtype, segment.positions, m) == 0) {
        known = false;
      }
    }
    const int64_t first = known ? row * segment.stride : 0;
    float scale = 1.0f;
    if (segment.norm_weight) {
      float squares = 0.0f;
      for (int64_t k = threadIdx.x; known && k < segment.length; k += kStreamThreads) {
        const float x = load_as(segment.dtype, segment.data, first + k);
        squares = fmaf(x, x, squares);
      }
      squares = block_sum<kStreamThreads>(squares, scratch[s]);
      scale = 1.0f / sqrtf(squares / static_cast<float>(segment.length) + p.eps);
    }
    for (int64_t k = threadIdx.x; k < segment.length; k += kStreamThreads) {
      float x = known ? load_as(segment.dtype, segment.data, first + k) : 0.0f;
      if (segment.norm_weight) {
        x *= scale * (load_as(segment.norm_dtype, segment.norm_weight, k) + p.norm_offset);
      }
      for (int piece = 0; piece < p.pieces; ++piece) {
        const C part = from_float<C>(x);
        out[piece * piece_stride + base + k] = part;
        x = remainder_of(x, to_float(part));
      }
    }
    base += segment.length;
  }
  for (int64_t k = base + threadIdx.x; k < p.out_stride; k += kStreamThreads) {
    for (int piece = 0; piece < p.pieces; ++piece) {
      out[piece * piece_stride + k] = from_float<C>(0.0f);
    }
  }
}

// ---- weights ---------------------------------------------------------------------------------

template <typename W>
struct Layout {
  static constexpr int kPiece = 16 / sizeof(W);   // elements of a thread's 16 bytes
  static constexpr int kSteps = kPiece / 4;       // products of depth 16 they feed
  static constexpr int kChunk = 128 / sizeof(W);  // k per stage
  static constexpr int kColumns = kChunk / 8;     // 16-byte columns of an activation row in a stage

  // Exchanges columns so that the quads of the rows read together fall on different banks.
  static __device__ __forceinline__ int swizzle(int m) {
    return kPiece == 8 ? (m & 1) << 2 : kPiece == 16 ? m & 1 : m & 2;
  }
};

// ---- the kernel ------------------------------------------------------------------------------

struct StreamParams {
  const void* weight;  // [n, k], rows weight_stride apart
  const void* x;       // [pieces][m][x_stride], packed
  int64_t n, k, weight_stride, x_stride;
  int m, pieces;
  int chunks, chunks_per_split;
  bool narrow;  // rows are aligned to 8 bytes only
};

template <typename W, typename C, int kBlocks, typename Epilogue>
__global__ void __launch_bounds__(kStreamThreads, kBlocks > 4 ? 1 : 2)
    weight_stream_kernel(const StreamParams p, const typename Epilogue::Params e) {
  using L = Layout<W>;
  constexpr int kStages = stream_stages(kBlocks), kRows = 8 * kBlocks;
  extern __shared__ __align__(128) unsigned char smem[];
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int quad = lane / 4, t = lane % 4;
  const int x_stage_bytes = p.pieces * kRows * L::kColumns * 16;
  unsigned char* const x_stages = smem + kStages * kStageWeightBytes;
  float* const tile_smem = reinterpret_cast<float*>(x_stages + kStages * x_stage_bytes);

  const int tiles = static_cast<int>((p.n + kStreamTile - 1) / kStreamTile);
  const int chunk_begin = blockIdx.y * p.chunks_per_split;
  const int chunk_end = min(p.chunks, chunk_begin + p.chunks_per_split);

  const uint64_t policy = evict_first_policy();
  int load_tile = blockIdx.x, load_chunk = chunk_begin;
  const auto load = [&](int slot) {
    if (load_tile < tiles) {
      const uint32_t to = shared_address(smem) + slot * kStageWeightBytes + thread * 16;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row =
            static_cast<int64_t>(load_tile) * kStreamTile + warp * 16 + r * 8 + quad;
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const int64_t k = static_cast<int64_t>(load_chunk) * L::kChunk + (u * 4 + t) * L::kPiece;
          const bool valid = row < p.n && k < p.k;
          const W* from = static_cast<const W*>(p.weight) + (valid ? row * p.weight_stride + k : 0);
          const uint32_t at = to + (r * 2 + u) * kStreamThreads * 16;
          if (sizeof(W) == 1 && p.narrow) {
            const bool second = valid && k + 8 < p.k;
            copy8(at, from, valid);
            copy8(at + 8, second ? from + 8 : from, second);
          } else {
            copy16(at, from, valid, policy);
          }
        }
      }
      const uint32_t x_to = shared_address(x_stages) + slot * x_stage_bytes;
      const C* x = static_cast<const C*>(p.x) + static_cast<int64_t>(load_chunk) * L::kChunk;
      for (int i = thread; i < p.pieces * kRows * L::kColumns; i += kStreamThreads) {
        const int column = i % L::kColumns, row = i / L::kColumns;
        const int m = row % kRows, piece = row / kRows;
        const bool valid = m < p.m;
        const int64_t from = (static_cast<int64_t>(piece) * p.m + m) * p.x_stride + column * 8;
        copy16(x_to + (row * L::kColumns + (column ^ L::swizzle(m))) * 16, x + (valid ? from : 0),
               valid);
      }
      if (++load_chunk == chunk_end) {
        load_chunk = chunk_begin;
        load_tile += gridDim.x;
      }
    }
    commit_copies();
  };

  float acc[kBlocks][4] = {};
  const auto multiply = [&](int slot) {
    const unsigned char* w = smem + slot * kStageWeightBytes + thread * 16;
    const unsigned char* x = x_stages + slot * x_stage_bytes;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      uint32_t piece[2][4];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 v = *reinterpret_cast<const uint4*>(w + (r * 2 + u) * kStreamThreads * 16);
        piece[r][0] = v.x;
        piece[r][1] = v.y;
        piece[r][2] = v.z;
        piece[r][3] = v.w;
      }
      constexpr int kSummands = Operand<W, C>::kSummands;
      uint32_t a[L::kSteps][kSummands][4];
#pragma unroll
      for (int s = 0; s < L::kSteps; ++s) {
        uint32_t upper[kSummands][2], lower[kSummands][2];
        Operand<W, C>::widen(piece[0], s, upper);
        Operand<W, C>::widen(piece[1], s, lower);
#pragma unroll
        for (int i = 0; i < kSummands; ++i) {
          a[s][i][0] = upper[i][0];
          a[s][i][1] = lower[i][0];
          a[s][i][2] = upper[i][1];
          a[s][i][3] = lower[i][1];
        }
      }
#pragma unroll 1
      for (int part = 0; part < p.pieces; ++part) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          const int m = block * 8 + quad;
          const unsigned char* row = x + (part * kRows + m) * L::kColumns * 16;
          uint32_t b[L::kPiece / 2];
          if constexpr (L::kPiece == 4) {
            const int column = (2 * u + t / 2) ^ L::swizzle(m);
            const uint2 v = *reinterpret_cast<const uint2*>(row + column * 16 + (t & 1) * 8);
            b[0] = v.x;
            b[1] = v.y;
          } else {
#pragma unroll
            for (int i = 0; i < L::kPiece / 8; ++i) {
              const int column = ((4 * u + t) * (L::kPiece / 8) + i) ^ L::swizzle(m);
              const uint4 v = *reinterpret_cast<const uint4*>(row + column * 16);
              b[4 * i] = v.x;
              b[4 * i + 1] = v.y;
              b[4 * i + 2] = v.z;
              b[4 * i + 3] = v.w;
            }
          }
#pragma unroll
          for (int s = 0; s < L::kSteps; ++s) {
#pragma unroll
            for (int i = 0; i < kSummands; ++i) {
              if (i + part < 3) mma<C>(acc[block], a[s][i], b[2 * s], b[2 * s + 1]);
            }
          }
        }
      }
    }
  };

  Epilogue epilogue(e, p, tile_smem + kRows * kTilePitch);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load(s);
  int slot = 0, free_slot = kStages - 1, chunk = chunk_begin;
  for (int tile = blockIdx.x; tile < tiles;) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load(free_slot);
    free_slot = free_slot + 1 == kStages ? 0 : free_slot + 1;
    multiply(slot);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    if (++chunk < chunk_end) continue;

    chunk = chunk_begin;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = block * 8 + 2 * t + (i & 1), row = warp * 16 + quad + (i >> 1) * 8;
        tile_smem[m * kTilePitch + row] = acc[block][i];
        acc[block][i] = 0.0f;
      }
    }
    __syncthreads();
    epilogue.take(tile, tile_smem);
    tile += gridDim.x;
  }
  wait_copies<0>();
  epilogue.finish();
}

// ---- host side -------------------------------------------------------------------------------

// How one product of up to 64 rows is laid out; depends on shapes and dtypes only.
struct StreamPlan {
  int64_t n, k;
  DType weight_dtype;
  bool f16_operands;
  int pieces;
  int chunks, splits, chunks_per_split;
  int64_t x_stride;

  int tiles() const { return static_cast<int>(ceil_div<int64_t>(n, kStreamTile)); }
  int64_t packed_bytes(int64_t rows) const { return align(pieces * rows * x_stride * 2); }
  static int64_t align(int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; }
};

// x_dtype is the finest dtype among the activations' sources.
inline StreamPlan make_plan(int64_t n, int64_t k, DType weight_dtype, DType x_dtype, bool split) {
  StreamPlan plan;
  plan.n = n;
  plan.k = k;
  plan.weight_dtype = weight_dtype;
  plan.f16_operands = weight_dtype == DType::kF16 && x_dtype == DType::kF16;
  plan.pieces = x_dtype == DType::kBF16 || plan.f16_operands ? 1 : x_dtype == DType::kF16 ? 2 : 3;
  const int chunk = 128 / dtype_bytes(weight_dtype);
  // At least one stage, which a k of 0 fills with zeros.
  plan.chunks = static_cast<int>(std::max<int64_t>(1, ceil_div<int64_t>(k, chunk)));
  plan.x_stride = static_cast<int64_t>(plan.chunks) * chunk;
  // Enough CTAs for the largest parts with two per processor, but no split below four stages.
  constexpr int kWanted = 264;
  const int wanted = split ? std::max(1, kWanted / plan.tiles()) : 1;
  plan.chunks_per_split = std::max(ceil_div(plan.chunks, wanted), std::min(plan.chunks, 4));
  plan.splits = ceil_div(plan.chunks, plan.chunks_per_split);
  return plan;
}

inline int device_attribute(cudaDeviceAttr attribute, const char* op) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), op);
  check(cudaDeviceGetAttribute(&value, attribute, device), op);
  return value;
}

inline int64_t stream_smem(const StreamPlan& plan, int blocks, int64_t epilogue_bytes) {
  const int64_t rows = 8 * blocks, chunk = 128 / dtype_bytes(plan.weight_dtype);
  return stream_stages(blocks) * (kStageWeightBytes + plan.pieces * rows * chunk * 2) +
         rows * kTilePitch * 4 + epilogue_bytes;
}

// The rows of the next pass over the weights: as many as shared memory holds, up to 64.
inline int rows_per_pass(const StreamPlan& plan, int64_t epilogue_bytes_per_row, const char* op) {
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, op);
  for (const int blocks : {8, 4, 2}) {
    if (stream_smem(plan, blocks, 8 * blocks * epilogue_bytes_per_row) <= limit) return 8 * blocks;
  }
  return 8;
}

template <typename W, typename C, int kBlocks, typename Epilogue>
void launch_blocks(const StreamParams& p, const typename Epilogue::Params& e, dim3 grid,
                   int64_t smem, cudaStream_t stream, const char* op) {
  const auto kernel = weight_stream_kernel<W, C, kBlocks, Epilogue>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(smem)),
        op);
  kernel<<<grid, kStreamThreads, smem, stream>>>(p, e);
  check_launch(op);
}

template <typename W, typename C, typename Epilogue>
void launch_typed(const StreamPlan& plan, const StreamParams& p, const typename Epilogue::Params& e,
                  int64_t epilogue_bytes_per_row, int grid_x, cudaStream_t stream, const char* op) {
  const int blocks = p.m <= 8 ? 1 : p.m <= 16 ? 2 : p.m <= 32 ? 4 : 8;
  const int64_t smem = stream_smem(plan, blocks, 8 * blocks * epilogue_bytes_per_row);
  const dim3 grid(grid_x, plan.splits);
  if (blocks == 1) {
    launch_blocks<W, C, 1, Epilogue>(p, e, grid, smem, stream, op);
  } else if (blocks == 2) {
    launch_blocks<W, C, 2, Epilogue>(p, e, grid, smem, stream, op);
  } else if (blocks == 4) {
    launch_blocks<W, C, 4, Epilogue>(p, e, grid, smem, stream, op);
  } else {
    launch_blocks<W, C, 8, Epilogue>(p, e, grid, smem, stream, op);
  }
}

// Packs the rows, then streams the weights past them with grid_x CTAs per split.
template <typename Epilogue>
void stream_weights(const StreamPlan& plan, PackParams pack, void* packed, const void* weight,
                    int64_t weight_stride, const typename Epilogue::Params& e,
                    int64_t epilogue_bytes_per_row, int grid_x, cudaStream_t stream,
                    const char* op) {
  pack.out = packed;
  pack.out_stride = plan.x_stride;
  pack.pieces = plan.pieces;
  if (plan.f16_operands) {
    pack_rows_kernel<__half><<<pack.rows, kStreamThreads, 0, stream>>>(pack);
  } else {
    pack_rows_kernel<__nv_bfloat16><<<pack.rows, kStreamThreads, 0, stream>>>(pack);
  }
  check_launch(op);

  StreamParams p;
  p.weight = weight;
  p.x = packed;
  p.n = plan.n;
  p.k = plan.k;
  p.weight_stride = weight_stride;
  p.x_stride = plan.x_stride;
  p.m = pack.rows;
  p.pieces = plan.pieces;
  p.chunks = plan.chunks;
  p.chunks_per_split = plan.chunks_per_split;
  p.narrow = !aligned_16(weight) || weight_stride * dtype_bytes(plan.weight_dtype) % 16 != 0 ||
             plan.k * dtype_bytes(plan.weight_dtype) % 16 != 0;
  const auto run = [&](auto w, auto c) {
    launch_typed<decltype(w), decltype(c), Epilogue>(plan, p, e, epilogue_bytes_per_row, grid_x,
                                                     stream, op);
  };
  using BF16 = __nv_bfloat16;
  switch (plan.weight_dtype) {
    case DType::kBF16:
      return run(BF16{}, BF16{});
    case DType::kF16:
      return plan.f16_operands ? run(__half{}, __half{}) : run(__half{}, BF16{});
    case DType::kF32:
      return run(float{}, BF16{});
    case DType::kI8:
      return run(int8_t{}, BF16{});
    case DType::kF8E4M3:
      return run(__nv_fp8_e4m3{}, BF16{});
    default:
      throw std::runtime_error(std::string(op) + ": unsupported weight dtype");
  }
}

}  // namespace mtp::cuda

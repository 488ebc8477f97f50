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
// same way for 1, 2 and 4-byte dtypes, and are widened in registers (operand.cuh). The pipeline
// runs on across tiles, so a persistent CTA never drains it.
//
// Activations come straight from the tensors, gathered by token id where asked, one chunk of k
// ahead in registers; they are multiplied by the norm's weight, rounded to the operand type C or
// split exactly into two (f16) or three (f32) bf16 summands, and written once per CTA to shared
// memory, swizzled so that fragments are read without bank conflicts. The factor of a RMSNorm is
// the same for a whole row, so it waits for the end: the CTA adds up the squares of what passes by
// and the epilogue scales the sums. Chunks stay in shared memory for all tiles of the CTA where
// they fit (`resident`), else they are read again, from L2, for every tile.
//
// Each sum runs over ascending stages, pieces and summands in f32, whatever the number of rows, so
// a row's bits do not depend on it. With few tiles, k is split over the grid at places that depend
// on N and K only (split_sum.cuh adds the parts in order).
//
// Shared memory, bf16: 70, 77, 89 and 98 KB at 8, 16, 32 and 64 rows, of which 64 KB (three stages
// at 64 rows: 48 KB) are weights under way; resident chunks take 2 bytes per row and k instead of
// 1, 2, 4 or 8 KB twice. f32 activations with one-byte weights take 178 KB at 64 rows, or 130 KB
// with one chunk at a time where less is there (sm_80); devices with 99 KB take them in passes of
// 16 rows. Registers, no spills: on sm_90a at most 128, 124, 172 and 255 behind a linear
// layer, 96, 96, 151 and 238 behind head_topk, on sm_80 fewer; one-byte weights need most.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/common/activations.cuh"
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
// CTAs that share a processor, as far as registers go: chunks of one-byte weights are long, and so
// are the activations under way with them.
constexpr int stream_occupancy(int blocks, int weight_bytes) {
  return blocks > 4 || (blocks == 4 && weight_bytes == 1) ? 1 : 2;
}

// What an epilogue is told about a finished tile: sums[row * pitch + column].
struct FinishedTile {
  const float* sums;
  int pitch;
  const float* squares;  // [rows], of the k summed over, or null without a norm
  int tile;              // columns from 128 * tile
  int split, ticket;     // which part of k; a number of its own for every tile
  int first_row, rows;
};

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
  Segment segments[2];
  const void* weight;  // [n, segments * length], rows weight_stride apart
  int64_t n, weight_stride;
  float norm_offset;
  int m, pieces;
  int chunks, chunks_per_split, splits;  // of one segment
  int x_buffers;
  bool resident;
  bool narrow;  // rows are aligned to 8 bytes only
};

template <typename W, typename C, int kBlocks, typename Epilogue>
__global__ void __launch_bounds__(kStreamThreads, stream_occupancy(kBlocks, sizeof(W)))
    weight_stream_kernel(const StreamParams p, const typename Epilogue::Params e) {
  using L = Layout<W>;
  constexpr int kStages = stream_stages(kBlocks), kRows = 8 * kBlocks;
  constexpr int kXPieces = kRows * L::kColumns;  // of 8 elements, in a chunk
  constexpr int kXPerThread = (kXPieces + kStreamThreads - 1) / kStreamThreads;
  extern __shared__ __align__(128) unsigned char smem[];
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int quad = lane / 4, t = lane % 4;
  const int x_bytes = p.pieces * kXPieces * 16;
  unsigned char* const x_chunks = smem + kStages * kStageWeightBytes;
  float* const tile_smem = reinterpret_cast<float*>(x_chunks + p.x_buffers * x_bytes);
  // Offset of a row's first element; negative: the row is zero.
  int64_t* const row_start = reinterpret_cast<int64_t*>(tile_smem + kRows * kTilePitch);
  float* const row_squares = reinterpret_cast<float*>(row_start + kRows);

  const int tiles = static_cast<int>((p.n + kStreamTile - 1) / kStreamTile);
  const bool second = static_cast<int>(blockIdx.y) >= p.splits;
  Segment segment = p.segments[0];
  if (second) segment = p.segments[1];
  const int length = static_cast<int>(segment.length);
  const int chunk_begin = (blockIdx.y - (second ? p.splits : 0)) * p.chunks_per_split;
  const int chunk_end = min(p.chunks, chunk_begin + p.chunks_per_split);

  const uint64_t policy = evict_first_policy();
  int load_tile = blockIdx.x, load_chunk = chunk_begin;
  const auto load = [&](int slot) {
    if (load_tile < tiles) {
      const uint32_t to = shared_address(smem) + slot * kStageWeightBytes + thread * 16;
      const W* const weight = static_cast<const W*>(p.weight) + (second ? length : 0);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row =
            static_cast<int64_t>(load_tile) * kStreamTile + warp * 16 + r * 8 + quad;
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const int k = load_chunk * L::kChunk + (u * 4 + t) * L::kPiece;
          const bool valid = row < p.n && k < length;
          const W* from = valid ? weight + row * p.weight_stride + k : weight;
          const uint32_t at = to + (r * 2 + u) * kStreamThreads * 16;
          if (sizeof(W) == 1 && p.narrow) {
            const bool whole = valid && k + 8 < length;
            copy8(at, from, valid);
            copy8(at + 8, whole ? from + 8 : from, whole);
          } else {
            copy16(at, from, valid, policy);
          }
        }
      }
      if (++load_chunk == chunk_end) {
        load_chunk = chunk_begin;
        load_tile += gridDim.x;
      }
    }
    commit_copies();
  };

  // The next chunk of activations: in registers, then widened, in shared memory.
  RawPiece raw[kXPerThread];
  float squares[kXPerThread] = {};
  int x_tile = blockIdx.x, x_chunk = chunk_begin;
  int fetched = 0;  // the chunk in registers, or -1
  bool first_time = true;
  const auto fetch = [&] {
    first_time = x_tile == static_cast<int>(blockIdx.x);
    fetched = x_tile < tiles && (first_time || !p.resident) ? x_chunk : -1;
    if (fetched >= 0) {
#pragma unroll
      for (int i = 0; i < kXPerThread; ++i) {
        const int piece = i * kStreamThreads + thread;
        const int k = fetched * L::kChunk + piece % L::kColumns * 8;
        const int64_t start = piece < kXPieces ? row_start[piece / L::kColumns] : -1;
        raw[i] = start >= 0 && k < length ? load_raw(segment, start + k) : RawPiece{};
      }
    }
    if (++x_chunk == chunk_end) {
      x_chunk = chunk_begin;
      x_tile += gridDim.x;
    }
  };
  const auto convert = [&](int slot) {
#pragma unroll
    for (int i = 0; i < kXPerThread; ++i) {
      const int piece = i * kStreamThreads + thread;
      const int m = piece / L::kColumns, column = piece % L::kColumns;
      if (piece >= kXPieces) break;
      float x[8];
      widen_raw(segment.dtype, raw[i], x);
      const int k = fetched * L::kChunk + column * 8;
      if (segment.norm_weight && k < length && row_start[m] >= 0) {
        if (first_time) {
#pragma unroll
          for (int j = 0; j < 8; ++j) squares[i] = fmaf(x[j], x[j], squares[i]);
        }
        scale_by_norm_weight(segment, k, p.norm_offset, x);
      }
      unsigned char* to =
          x_chunks + slot * x_bytes + (m * L::kColumns + (column ^ L::swizzle(m))) * 16;
      for (int part = 0; part < p.pieces; ++part) {
        uint32_t packed[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          packed[j] = pack2<C>(x[2 * j], x[2 * j + 1]);
          const float2 rounded = unpack2<C>(packed[j]);
          x[2 * j] = remainder_of(x[2 * j], rounded.x);
          x[2 * j + 1] = remainder_of(x[2 * j + 1], rounded.y);
        }
        *reinterpret_cast<uint4*>(to) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        to += kXPieces * 16;
      }
    }
  };

  float acc[kBlocks][4] = {};
  const auto multiply = [&](int slot, const unsigned char* x) {
    const unsigned char* w = smem + slot * kStageWeightBytes + thread * 16;
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
              if (summands_meet(i, part)) mma<C>(acc[block], a[s][i], b[2 * s], b[2 * s + 1]);
            }
          }
        }
      }
    }
  };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) load(s);
  for (int m = thread; m < kRows; m += kStreamThreads) {
    row_start[m] = m < p.m ? start_of_row(segment, m) : -1;
  }
  Epilogue epilogue(e, row_squares + kRows, blockIdx.x, 0, p.m);
  __syncthreads();
  fetch();
  convert(0);
  fetch();

  const int x_slots = p.resident ? chunk_end - chunk_begin : p.x_buffers;
  int slot = 0, free_slot = kStages - 1, x_slot = 0, chunk = chunk_begin;
  for (int tile = blockIdx.x; tile < tiles;) {
    wait_copies<kStages - 2>();
    __syncthreads();
    load(free_slot);
    free_slot = free_slot + 1 == kStages ? 0 : free_slot + 1;
    multiply(slot, x_chunks + x_slot * x_bytes);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    x_slot = x_slot + 1 == x_slots ? 0 : x_slot + 1;
    if (fetched >= 0) {
      if (x_slots == 1) __syncthreads();
      convert(x_slot);
      fetch();
    }
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
    if (segment.norm_weight && tile == static_cast<int>(blockIdx.x)) {
#pragma unroll
      for (int i = 0; i < kXPerThread; ++i) {
        const int piece = i * kStreamThreads + thread;
        float sum = squares[i];
#pragma unroll
        for (int offset = L::kColumns / 2; offset > 0; offset /= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, offset);
        }
        if (piece < kXPieces && piece % L::kColumns == 0) row_squares[piece / L::kColumns] = sum;
      }
    }
    __syncthreads();
    epilogue.take({tile_smem, kTilePitch, segment.norm_weight ? row_squares : nullptr, tile,
                   static_cast<int>(blockIdx.y), tile, 0, p.m});
    tile += gridDim.x;
  }
  wait_copies<0>();
  epilogue.finish();
}

// ---- host side -------------------------------------------------------------------------------

// How one product of up to 64 rows is laid out; depends on shapes and dtypes only.
struct StreamPlan {
  int64_t n, length;  // length of a segment
  DType weight_dtype;
  bool f16_operands;
  int segments, pieces;
  int chunks, splits, chunks_per_split;  // of one segment

  int tiles() const { return static_cast<int>(ceil_div<int64_t>(n, kStreamTile)); }
  int parts() const { return segments * splits; }
};

// x_dtype is the finest dtype among the activations' sources. Values that wait for their norm may
// be out of f16's range.
inline StreamPlan make_plan(int64_t n, int64_t length, int segments, DType weight_dtype,
                            DType x_dtype, bool normed, bool split) {
  StreamPlan plan;
  plan.n = n;
  plan.length = length;
  plan.segments = segments;
  plan.weight_dtype = weight_dtype;
  plan.f16_operands = weight_dtype == DType::kF16 && x_dtype == DType::kF16 && !normed;
  plan.pieces = x_dtype == DType::kBF16 || plan.f16_operands ? 1 : x_dtype == DType::kF16 ? 2 : 3;
  const int chunk = 128 / dtype_bytes(weight_dtype);
  // At least one stage, which a length of 0 fills with zeros.
  plan.chunks = static_cast<int>(std::max<int64_t>(1, ceil_div<int64_t>(length, chunk)));
  // Enough CTAs for the largest parts with two per processor, but no split below four stages.
  constexpr int kWanted = 264;
  const int wanted = split ? std::max(1, kWanted / (segments * plan.tiles())) : 1;
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

inline int64_t align_256(int64_t bytes) { return ceil_div<int64_t>(bytes, 256) * 256; }

// What a launch of so many rows takes of a device.
struct StreamShape {
  int blocks, x_buffers, ctas_per_processor;
  int64_t smem;
  bool resident;

  int rows() const { return 8 * blocks; }
};

// The shape for the next of `rows` rows: up to 64, or as many as shared memory holds.
inline StreamShape make_shape(const StreamPlan& plan, int64_t rows, int64_t epilogue_bytes,
                              int64_t epilogue_bytes_per_row, const char* op) {
  const int64_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, op);
  const int64_t all = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, op);
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, op);
  StreamShape shape;
  shape.blocks = rows <= 8 ? 1 : rows <= 16 ? 2 : rows <= 32 ? 4 : 8;
  for (;; shape.blocks /= 2) {
    const int64_t x_bytes = plan.pieces * shape.rows() * 2 * (128 / dtype_bytes(plan.weight_dtype));
    const int64_t fixed = stream_stages(shape.blocks) * kStageWeightBytes + epilogue_bytes +
                          shape.rows() * (kTilePitch * 4 + 12 + epilogue_bytes_per_row);
    const auto use = [&](int buffers) {
      constexpr int64_t kReserved = 1024;  // of every CTA, by the driver
      shape.x_buffers = buffers;
      shape.smem = fixed + buffers * x_bytes;
      const int64_t fitting = all / (shape.smem + kReserved);
      shape.ctas_per_processor =
          fitting >= 2 ? stream_occupancy(shape.blocks, dtype_bytes(plan.weight_dtype)) : 1;
      return shape.smem <= limit;
    };
    shape.resident = false;
    const bool fits = use(2) || use(1);
    if (!fits && shape.blocks > 1) continue;
    const int64_t at_once = static_cast<int64_t>(shape.ctas_per_processor) * processors;
    if (static_cast<int64_t>(plan.tiles()) * plan.parts() > at_once) {
      const StreamShape streamed = shape;
      shape.resident = use(plan.chunks_per_split);
      if (!shape.resident) shape = streamed;
    }
    return shape;
  }
}

// Persistent CTAs per part of k.
inline int stream_ctas(const StreamPlan& plan, const StreamShape& shape, const char* op) {
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, op);
  return std::min(plan.tiles(), std::max(1, shape.ctas_per_processor * processors / plan.parts()));
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

// Streams the weights past p.m <= shape.rows() rows with grid_x CTAs per part of k. Of p, what the
// plan and the shape say is filled in here.
template <typename Epilogue>
void stream_weights(const StreamPlan& plan, const StreamShape& shape, StreamParams p,
                    const typename Epilogue::Params& e, int grid_x, cudaStream_t stream,
                    const char* op) {
  p.n = plan.n;
  p.pieces = plan.pieces;
  p.chunks = plan.chunks;
  p.chunks_per_split = plan.chunks_per_split;
  p.splits = plan.splits;
  p.x_buffers = shape.x_buffers;
  p.resident = shape.resident;
  p.narrow = !aligned_16(p.weight) || p.weight_stride * dtype_bytes(plan.weight_dtype) % 16 != 0 ||
             plan.length * dtype_bytes(plan.weight_dtype) % 16 != 0;
  const dim3 grid(grid_x, plan.parts());
  const auto run = [&](auto w, auto c) {
    using W = decltype(w);
    using C = decltype(c);
    switch (shape.blocks) {
      case 1:
        return launch_blocks<W, C, 1, Epilogue>(p, e, grid, shape.smem, stream, op);
      case 2:
        return launch_blocks<W, C, 2, Epilogue>(p, e, grid, shape.smem, stream, op);
      case 4:
        return launch_blocks<W, C, 4, Epilogue>(p, e, grid, shape.smem, stream, op);
      default:
        return launch_blocks<W, C, 8, Epilogue>(p, e, grid, shape.smem, stream, op);
    }
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

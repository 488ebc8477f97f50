// C = A B^T for large M on sm_80 and up: cp.async stages, tensor cores, f32 sums. On sm_90a two
// operands of one 16-bit type are multiplied by wgmma (wgmma.cuh) as they lie in shared memory, all
// else by mma.sync m16n8k16 on fragments in registers.
//
// A CTA of 8 warps makes a 128 x 128 tile of C, 64 sums per thread: with wgmma a warp has 16 x 128
// of it, with mma.sync 64 x 32. Both operands are copied as they are, 32 steps of k per stage; what
// mma.sync takes becomes a tensor-core operand in registers (operand.cuh), so any two element types
// meet. Each may be stored with k innermost (kInner) or with k as the slow dimension (kOuter),
// which covers a layer's product and both of its gradients:
//
//   y = x w^T        A = x  [m, k] kInner,  B = w [n, k] kInner
//   dx = dy w        A = dy [m, k] kInner,  B = w [k, n] kOuter
//   dw = dy^T x      A = dy [k, m] kOuter,  B = x [k, n] kOuter
//
// Any sizes: what lies outside is neither read nor counts. Rows in memory must be aligned to 16
// bytes (one-byte elements, which are kInner only, to 8). Pieces of 16 bytes are swizzled so that
// neither copies nor fragment loads have bank conflicts, 16-bit ones as wgmma reads them. A sum
// runs over ascending k whatever the sizes, so a row's bits depend neither on m nor on the other
// rows.
//
// Shared memory, aligned to 1024 bytes: 68 KB for 16-bit operands (4 stages, or a finished tile),
// 72 KB with one f32 operand and 96 KB with two (3 stages): one CTA fits every sm_8x and sm_12x
// device, two of the first fit sm_80 and sm_90. Registers, no spills on sm_80 and sm_90a: at most
// 128 for 16-bit and one-byte operands, 216 with f32.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/async_copy.cuh"
#include "cuda/common/operand.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/wgmma.cuh"
#include "mtp/types.h"

namespace mtp::cuda {

enum class Order { kInner, kOuter };  // k is the innermost dimension in memory, or the outer one

// An operand in memory.
template <typename T>
struct Matrix {
  const T* data;
  int64_t stride;  // elements between rows in memory
  int64_t extent;  // m or n: the dimension that is not summed over
};

template <typename A, Order kOrderA, typename B, Order kOrderB>
struct Gemm {
  static constexpr int kThreads = 256, kTile = 128, kDepth = 32;
  static constexpr int kTilePitch = kTile + 8;  // floats between rows of a tile in shared memory
  static constexpr bool kWide = sizeof(A) == 4 || sizeof(B) == 4;
  static constexpr int kStages = kWide ? 3 : 4;
  static constexpr int kBytesA = kTile * kDepth * sizeof(A);
  static constexpr int kStageBytes = kBytesA + kTile * kDepth * sizeof(B);
  static constexpr int kTileBytes = kTile * kTilePitch * 4;
  static constexpr int kSmemBytes =
      kStages * kStageBytes > kTileBytes ? kStages* kStageBytes : kTileBytes;
  static constexpr int kCtasPerSm = kWide ? 1 : 2;
  using C = ProductType<A, B>;

  static constexpr bool kWgmma = kHasWgmma && std::is_same_v<A, B> && sizeof(A) == 2;
  using Warpgroup = Wgmma<A, kOrderA == Order::kOuter, kOrderB == Order::kOuter>;
  // Stages that are copied ahead of use. Of the others one is in use, and with wgmma, which reads
  // while its warps go on, the one before too.
  static constexpr int kAhead = kStages - (kWgmma ? 2 : 1);

  // A warp's part of the tile: 16 blocks of 16 x 8, 4 x 4 of them or, with wgmma, side by side.
  using Accumulator = float[16][4];

  // How a stage of one operand lies in shared memory.
  template <typename T, Order kOrder>
  struct Stage {
    static_assert(sizeof(T) > 1 || kOrder == Order::kInner, "one-byte operands have k innermost");
    static constexpr int kRowBytes = (kOrder == Order::kInner ? kDepth : kTile) * sizeof(T);
    static constexpr int kColumns = kRowBytes / 16, kPiece = 16 / sizeof(T);
    static constexpr int kPieces = kTile * kDepth * sizeof(T) / 16 / kThreads;  // per thread

    static constexpr __device__ __forceinline__ int offset(int row, int column) {
      if constexpr (kOrder == Order::kInner) {
        column ^= sizeof(T) == 1 ? row >> 2 & 1 : sizeof(T) == 2 ? row >> 1 & 3 : (row & 3) << 1;
      } else if constexpr (sizeof(T) == 2) {  // two halves of 64 columns, one behind the other
        return row * 128 + (column >> 3) * kDepth * 128 + ((column ^ row) & 7) * 16;
      } else {
        column ^= row & 6;
      }
      return row * kRowBytes + column * 16;
    }

    // Whether wgmma looks for every piece where offset() has it.
    static constexpr bool suits_wgmma() {
      constexpr bool outer = kOrder == Order::kOuter;
      for (int row = 0; row < (outer ? kDepth : kTile); ++row) {
        for (int column = 0; column < kColumns; ++column) {
          const int mn = outer ? column * kPiece : row, k = outer ? row : column * kPiece;
          if (Warpgroup::template offset<outer>(mn, k) != offset(row, column)) return false;
        }
      }
      return true;
    }

    // body(row, column) for the pieces that this thread copies, stage by stage the same.
    template <typename Body>
    static __device__ __forceinline__ void each_piece(const Body& body) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int piece = i * kThreads + threadIdx.x;
        body(piece / kColumns, piece % kColumns);
      }
    }

    // Copies rows first .. first + 127 of the operand, steps k .. k + 31 of k_end.
    static __device__ __forceinline__ void load(uint32_t to, const Matrix<T>& x, int64_t first,
                                                int64_t k, int64_t k_end) {
      each_piece([&](int row, int column) {
        const bool inner = kOrder == Order::kInner;
        const int64_t outer_at = (inner ? first : k) + row;
        const int64_t inner_at = (inner ? k : first) + column * kPiece;
        const int64_t left = (inner ? k_end : x.extent) - inner_at;
        const bool valid = outer_at < (inner ? x.extent : k_end) && left > 0;
        const int bytes = !valid ? 0 : left < kPiece ? static_cast<int>(left * sizeof(T)) : 16;
        const T* const from = valid ? x.data + outer_at * x.stride + inner_at : x.data;
        const uint32_t at = to + offset(row, column);
        if (sizeof(T) == 1 && !is_aligned_16(x)) {
          copy8(at, from, bytes < 8 ? bytes : 8);
          copy8(at + 8, bytes > 8 ? from + 8 : from, bytes > 8 ? bytes - 8 : 0);
        } else {
          copy16(at, from, bytes);
        }
      });
    }

    // Rows mn .. mn + 15, steps k .. k + 15 of the stage, as mma's A operand.
    template <int kSummands>
    static __device__ __forceinline__ void fragment(const unsigned char* stage, int mn, int k,
                                                    uint32_t (&out)[kSummands][4]) {
      const int lane = threadIdx.x % kWarp, quad = lane / 4, t = lane % 4;
      uint32_t halves[2][4];  // of the rows of this quad: elements k + 2t, + 1, + 8, + 9
      if constexpr (sizeof(T) == 2) {
        const int i = lane / 8, j = lane % 8;
        uint32_t r[4];
        if constexpr (kOrder == Order::kInner) {
          load_matrices(r, shared_address(stage) + offset(mn + (i & 1) * 8 + j, k / 8 + (i >> 1)));
        } else {
          load_matrices_transposed(
              r, shared_address(stage) + offset(k + (i >> 1) * 8 + j, mn / 8 + (i & 1)));
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          halves[h][0] = r[h];
          halves[h][1] = r[2 + h];
        }
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = mn + h * 8 + quad;
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const int at = k + 2 * t + step * 8;
            if constexpr (sizeof(T) == 1) {
              const uint32_t two = *reinterpret_cast<const uint16_t*>(
                  stage + offset(row, at / kPiece) + at % kPiece);
              halves[h][0] = step == 0 ? two : halves[h][0] | two << 16;
            } else if constexpr (kOrder == Order::kInner) {
              const uint2 two = *reinterpret_cast<const uint2*>(stage + offset(row, at / kPiece) +
                                                                at % kPiece * 4);
              halves[h][2 * step] = two.x;
              halves[h][2 * step + 1] = two.y;
            } else {
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                halves[h][2 * step + e] = *reinterpret_cast<const uint32_t*>(
                    stage + offset(at + e, row / kPiece) + row % kPiece * 4);
              }
            }
          }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t pairs[kSummands][2];
        Operand<T, C>::widen(halves[h], 0, pairs);
#pragma unroll
        for (int i = 0; i < kSummands; ++i) {
          out[i][h] = pairs[i][0];
          out[i][h + 2] = pairs[i][1];
        }
      }
    }
  };

  using StageA = Stage<A, kOrderA>;
  using StageB = Stage<B, kOrderB>;

  template <typename T>
  static __device__ __forceinline__ bool is_aligned_16(const Matrix<T>& x) {
    return aligned_16(x.data) && x.stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  }

  // acc += a b^T over the 32 steps of a stage.
  static __device__ __forceinline__ void multiply_stage(const unsigned char* stage,
                                                        Accumulator& acc) {
    const int warp = threadIdx.x / kWarp, row = warp / 4 * 64, column = warp % 4 * 32;
    constexpr int kSummandsA = Operand<A, C>::kSummands, kSummandsB = Operand<B, C>::kSummands;
#pragma unroll
    for (int step = 0; step < kDepth; step += 16) {
      uint32_t of_b[2][kSummandsB][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        StageB::fragment(stage + kBytesA, column + j * 16, step, of_b[j]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t of_a[kSummandsA][4];
        StageA::fragment(stage, row + i * 16, step, of_a);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int p = 0; p < kSummandsA; ++p) {
#pragma unroll
            for (int q = 0; q < kSummandsB; ++q) {
              if (summands_meet(p, q)) {
                mma<C>(acc[i * 4 + j], of_a[p], of_b[j / 2][q][j % 2], of_b[j / 2][q][j % 2 + 2]);
              }
            }
          }
        }
      }
    }
  }

  // Rows of A that are multiplied as they lie in memory.
  struct PlainRows {
    const Matrix<A>& a;
    int64_t first;

    __device__ __forceinline__ void load(uint32_t to, int64_t k, int64_t k_end) const {
      StageA::load(to, a, first, k, k_end);
    }
    __device__ __forceinline__ void finish(unsigned char*, int64_t, int64_t) const {}
  };

  static __device__ __forceinline__ void multiply(const Matrix<A>& a, int64_t m, const Matrix<B>& b,
                                                  int64_t n, int64_t k_begin, int64_t k_end,
                                                  unsigned char* smem, Accumulator& acc) {
    multiply(PlainRows{a, m}, b, n, k_begin, k_end, smem, acc);
  }

  // acc += 128 rows of A times rows n .. n + 127 of b, over steps k_begin .. k_end - 1; k_begin
  // must be a multiple of 16. Shared memory is free for other use afterwards, and must be free of
  // readers before. rows.load() begins the copies of a stage of A; rows.finish() finds the pieces
  // that this thread has copied arrived, and may change them in place.
  template <typename Rows>
  static __device__ __forceinline__ void multiply(const Rows& rows, const Matrix<B>& b, int64_t n,
                                                  int64_t k_begin, int64_t k_end,
                                                  unsigned char* smem, Accumulator& acc) {
    int64_t k_load = k_begin;
    const auto load = [&](int slot) {
      if (k_load < k_end) {
        const uint32_t to = shared_address(smem) + slot * kStageBytes;
        rows.load(to, k_load, k_end);
        StageB::load(to + kBytesA, b, n, k_load, k_end);
        k_load += kDepth;
      }
      commit_copies();
    };
#pragma unroll 1  // unrolled, sm_80 code spills
    for (int s = 0; s < kAhead; ++s) load(s);
    int slot = 0, free_slot = kAhead;
    for (int64_t k = k_begin; k < k_end; k += kDepth) {
      unsigned char* const stage = smem + slot * kStageBytes;
      slot = slot + 1 == kStages ? 0 : slot + 1;
      wait_copies<kAhead - 1>();
      rows.finish(stage, k, k_end);
      if constexpr (kWgmma) Warpgroup::publish_copies();
      __syncthreads();
      load(free_slot);
      free_slot = free_slot + 1 == kStages ? 0 : free_slot + 1;
      if constexpr (kWgmma) {
        static_assert(StageA::suits_wgmma() && StageB::suits_wgmma());
        Warpgroup::start(stage, stage + kBytesA, acc);
        Warpgroup::template wait<1>(acc);
      } else {
        multiply_stage(stage, acc);
      }
    }
    if constexpr (kWgmma) Warpgroup::template wait<0>(acc);
    wait_copies<0>();
    __syncthreads();
  }

  // body(row, column, x, next) for every two neighbours in a row of the tile that this thread has.
  template <typename Body>
  static __device__ __forceinline__ void each_pair(const Accumulator& acc, const Body& body) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int row = (kWgmma ? warp * 16 : warp / 4 * 64) + lane / 4;
    const int column = (kWgmma ? 0 : warp % 4 * 32) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int down = kWgmma ? 0 : i / 4 * 16, right = (kWgmma ? i : i % 4) * 8;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        body(row + down + h * 8, column + right, acc[i][2 * h], acc[i][2 * h + 1]);
      }
    }
  }

  // The tile in shared memory, rows kTilePitch apart. Needs a barrier before it is read.
  static __device__ __forceinline__ void store_tile(const Accumulator& acc, float* tile) {
    each_pair(acc, [&](int row, int column, float x, float next) {
      *reinterpret_cast<float2*>(tile + row * kTilePitch + column) = make_float2(x, next);
    });
  }
};

}  // namespace mtp::cuda

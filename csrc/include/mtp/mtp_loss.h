// What the two training losses share. Row i of depth d is compared with the target of position
// i + d + shift; it counts iff that position lies in the same document and is unmasked. Rows that
// do not count are dropped before anything is multiplied: their hiddens are never read and their
// gradient is zero.
//
// The rows that count are listed by target position, then depth, and go in chunks through
// logits = hidden . weight + bias, softcap, a row function that turns logits into loss and gradient
// in place, and the two products that carry the gradient on. Gradients of the loss are computed
// where the logits are, so nothing is computed twice and no logits outlive their chunk.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "mtp/paged_cache.h"
#include "mtp/types.h"

namespace mtp {

constexpr int kMaxDepths = 64;

// c = a . b (+ c, if accumulate) in f32, row-major with the given strides between rows; a is [m,
// k], or [k, m] if trans_a; b is [k, n], or [n, k] if trans_b.
using Gemm = void (*)(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const float* a,
                      int64_t a_stride, const float* b, int64_t b_stride, bool accumulate, float* c,
                      int64_t c_stride);
// The same of bf16 matrices, b as it lies; a sum in f32 rounded once.
using GemmBf16 = void (*)(bool trans_a, int64_t m, int64_t n, int64_t k, const void* a,
                          int64_t a_stride, const void* b, int64_t b_stride, void* c,
                          int64_t c_stride);

struct MtpLossParams {
  const void* hidden;          // [K, T, H]
  const void* weight;          // [V, H], hidden's dtype
  const void* bias;            // [V], hidden's dtype, or null
  const int32_t* cu_seqlens;   // [documents + 1], or null: one document
  const bool* loss_mask;       // [T] by target position, or null
  const float* depth_weights;  // [K], or null: 1 / K each
  float* loss;                 // []
  float* depth_loss;           // [K]
  int64_t* num_tokens;         // [K]
  float* grad_hidden;          // [K, T, H], or null: not wanted
  float* grad_weight;          // [V, H], or null
  float* grad_bias;            // [V], or null
  void* workspace;             // <op>_workspace() bytes, 64-byte aligned
  Gemm gemm;                   // cpu: PyTorch's own
  GemmBf16 gemm_bf16;          // likewise
  int64_t k, t, h, v, documents;
  int64_t depth_stride, row_stride;  // of hidden
  int64_t weight_stride;             // between rows
  int64_t shift;
  DType dtype;
  float softcap;

  bool wants_gradient() const { return grad_hidden || grad_weight || grad_bias; }
};

// About how much a chunk's logits take, with their gradient where it is stored beside them and with
// a teacher's. More is faster: the weights and their gradient are read once per chunk. On CUDA one
// chunk has to fill the device.
constexpr int64_t kLossChunkBytes = 96 << 20;
constexpr int64_t kCudaLossChunkBytes = 256 << 20;

inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Rows of a chunk of which each takes `row_bytes`: a multiple of `multiple`, at least `least`, and
// no more than there are. The environment variable MTP_LOSS_CHUNK_BYTES overrides `bytes`.
inline int64_t loss_chunk_rows(int64_t rows, int64_t row_bytes, int64_t bytes, int64_t multiple,
                               int64_t least) {
  if (const char* text = std::getenv("MTP_LOSS_CHUNK_BYTES")) {
    const int64_t wanted = std::atoll(text);
    if (wanted > 0) bytes = wanted;
  }
  const int64_t n = bytes / row_bytes / multiple * multiple;
  return std::min(rows, std::max(n, least));
}

}  // namespace mtp

// LM head, top-k and log-sum-exp in one pass over the weights; logits are never stored. A logit is
// softcap(norm(hidden) . weight[v] * weight_scale[v] + bias[v]). The order is that of the f32
// logits, ties lowest row first; NaN counts as less than -inf, and makes lse NaN.
#pragma once

#include <cstdint>

#include "mtp/types.h"

namespace mtp {

constexpr int kMaxTopK = 64;

struct HeadTopkParams {
  const void* hidden;         // [M, H]
  const void* weight;         // [V, H]
  const void* norm_weight;    // [H], hidden's dtype, or null: no norm
  const void* bias;           // [V], hidden's dtype, or null
  const float* weight_scale;  // [V], or null
  const void* token_map;      // [V], int32 or int64, or null
  float* logits;              // [M, k]
  int64_t* ids;               // [M, k]
  float* lse;                 // [M]
  void* workspace = nullptr;  // cuda: head_topk_workspace bytes
  int64_t m, h, v;
  int64_t hidden_stride, weight_stride;  // between rows
  int64_t vocab_offset;
  DType dtype, weight_dtype, map_dtype;
  int k;
  float eps, softcap;
  bool gemma_norm;
};

namespace cpu {
void launch_head_topk(const HeadTopkParams& p);
}
namespace cuda {
int64_t head_topk_workspace(const HeadTopkParams& p);
void launch_head_topk(const HeadTopkParams& p, void* stream);
}  // namespace cuda

}  // namespace mtp

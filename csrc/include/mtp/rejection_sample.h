// Rejection sampling from raw logits: filters, acceptance of drafts, one more token.
#pragma once

#include <cstdint>

#include "mtp/types.h"

namespace mtp {

struct RejectionSampleParams {
  const void* target_logits;      // [N+B, V], rows target_stride apart
  const void* draft_token_ids;    // [N]
  const int32_t* cu_draft_lens;   // [B+1]
  const int64_t* seeds;           // [B]
  const int64_t* positions;       // [B]
  const float* draft_probs;       // [N, V] or [N, m], rows probs_stride apart; null: one-hot
  const void* draft_ids;          // [N, m], rows ids_stride apart; null: not sparse
  const float* temperature;       // [B] or null
  const int32_t* top_k;           // [B] or null
  const float* top_p;             // [B] or null
  const float* min_p;             // [B] or null
  const uint32_t* token_bitmask;  // [N+B, ceil(V/32)], rows mask_stride apart, or null
  int32_t* token_ids;             // [B, max_draft_len + 1]
  int32_t* num_accepted;          // [B]
  int32_t* status;                // [B]
  void* workspace;                // rejection_sample_workspace() bytes, 16-byte aligned
  int64_t target_stride;
  int64_t probs_stride;
  int64_t ids_stride;
  int64_t mask_stride;
  int64_t batch;
  int64_t num_drafts;  // N
  int64_t vocab;
  int64_t sparse;  // m
  int64_t max_draft_len;
  DType logits_type;
  DType draft_token_type;
  DType draft_ids_type;
  bool block;
};

constexpr int64_t kMaxSparse = 64;

namespace cpu {
int64_t rejection_sample_workspace(const RejectionSampleParams& p);
void launch_rejection_sample(const RejectionSampleParams& p);
}  // namespace cpu
namespace cuda {
int64_t rejection_sample_workspace(const RejectionSampleParams& p);
void launch_rejection_sample(const RejectionSampleParams& p, void* stream);
}  // namespace cuda

}  // namespace mtp

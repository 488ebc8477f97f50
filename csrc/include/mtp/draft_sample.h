// One draw per request from the softmax over its k kept logits.
#pragma once

#include <cstdint>

#include "mtp/types.h"

namespace mtp {

struct DraftSampleParams {
  const float* topk_logits;  // [B, k]
  const void* topk_ids;      // [B, k]
  const int64_t* seeds;      // [B]
  const int64_t* positions;  // [B]
  const float* temperature;  // [B] or null: greedy
  int64_t* token_ids;        // [B]
  float* probs;              // [B, k]
  int64_t batch;
  int64_t k;
  uint32_t row;
  DType ids_type;
};

constexpr int kMaxDraftTopK = 64;

namespace cpu {
void launch_draft_sample(const DraftSampleParams& p);
}
namespace cuda {
void launch_draft_sample(const DraftSampleParams& p, void* stream);
}

}  // namespace mtp

// Attention of a step's new tokens over the paged cache and themselves; the new keys and values
// are appended in the same launch.
#pragma once

#include <cstdint>

#include "mtp/kv_append.h"
#include "mtp/paged_cache.h"
#include "mtp/types.h"

namespace mtp {

struct VerifyAttentionParams {
  KvAppendParams append;
  const void* q;             // [T, Hq, D]
  const int64_t* tree_mask;  // [T], or null: a chain
  const float* sinks;        // [Hq], or null
  void* out;                 // [T, Hq, D], dense
  float* lse;                // [T, Hq]
  float* workspace;          // verify_attention_workspace() bytes
  int64_t q_token_stride, q_head_stride;
  int64_t q_heads, max_q_len;
  int64_t window;  // a row sees keys at positions > its own - window; -1: all
  float scale;
  float softcap;  // 0: none
};

namespace cpu {
void launch_verify_attention(const VerifyAttentionParams& p);
int64_t verify_attention_workspace(const VerifyAttentionParams& p);
}  // namespace cpu
namespace cuda {
void launch_verify_attention(const VerifyAttentionParams& p, void* stream);
int64_t verify_attention_workspace(const VerifyAttentionParams& p);
}  // namespace cuda

}  // namespace mtp

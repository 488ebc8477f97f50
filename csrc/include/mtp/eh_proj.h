// out = concat(norm_e(embedding[ids]), norm_h(hidden)) @ weight^T + bias: the entrance of an MTP
// head. Every weight byte is read once for up to 64 rows; a row's result does not depend on the
// others, nor, up to 64, on their number. An id outside [0, V) and a row at position 0 take a zero
// embedding.
#pragma once

#include <cstdint>

#include "mtp/types.h"

namespace mtp {

struct EhProjParams {
  const void* token_ids;      // [T], int32 or int64
  const void* hidden;         // [T, H]
  const void* embedding;      // [V, H]
  const void* weight;         // [N, 2H]
  const void* enorm_weight;   // [H], hidden's dtype, or null: no norm
  const void* hnorm_weight;   // [H], hidden's dtype, or null: no norm
  const void* bias;           // [N], hidden's dtype, or null
  const void* positions;      // [T], int32 or int64, or null
  void* out;                  // [T, N], hidden's dtype
  void* workspace = nullptr;  // cuda: eh_proj_workspace bytes
  int64_t t, h, v, n;
  int64_t hidden_stride, embedding_stride, weight_stride;  // between rows
  DType dtype, embedding_dtype, weight_dtype, id_dtype, position_dtype;
  float eps;
  bool gemma_norm, hidden_first;
};

namespace cpu {
void launch_eh_proj(const EhProjParams& p);
}
namespace cuda {
int64_t eh_proj_workspace(const EhProjParams& p);
void launch_eh_proj(const EhProjParams& p, void* stream);
}  // namespace cuda

}  // namespace mtp

// out = x @ weight^T * weight_scale + bias: a linear layer for the few rows of a decoding step.
// Every weight byte is read once for up to 64 rows; a row's result does not depend on the others.
#pragma once

#include <cstdint>

#include "mtp/types.h"

namespace mtp {

struct SkinnyLinearParams {
  const void* x;              // [M, K]
  const void* weight;         // [N, K]
  const void* bias;           // [N], x's dtype, or null
  const float* weight_scale;  // [N], or null
  void* out;                  // [M, N], x's dtype
  void* workspace = nullptr;  // cuda: skinny_linear_workspace bytes
  int64_t m, n, k;
  int64_t x_stride, weight_stride;  // between rows
  DType dtype, weight_dtype;
};

namespace cpu {
void launch_skinny_linear(const SkinnyLinearParams& p);
}
namespace cuda {
int64_t skinny_linear_workspace(const SkinnyLinearParams& p);
void launch_skinny_linear(const SkinnyLinearParams& p, void* stream);
}  // namespace cuda

}  // namespace mtp

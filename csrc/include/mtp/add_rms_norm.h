// residual += x; out = residual / rms(residual) * weight.
#pragma once

#include "mtp/types.h"

namespace mtp {

struct AddRmsNormParams {
  float* residual;     // [T, H], updated in place
  const void* x;       // [T, H], or null: nothing is added
  const void* weight;  // [H]
  void* out;           // [T, H]
  DType dtype;         // of x, weight and out
  int64_t rows;
  int64_t hidden;
  float eps;
  bool gemma_norm;  // scale by 1 + weight
};

namespace cpu {
void launch_add_rms_norm(const AddRmsNormParams&);
}
namespace cuda {
void launch_add_rms_norm(const AddRmsNormParams&, void* stream);
}

}  // namespace mtp

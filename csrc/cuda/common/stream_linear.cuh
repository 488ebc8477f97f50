// A linear layer over activation segments: what skinny_linear and eh_proj share on the host side.
// The kernels are compiled once, in skinny_linear.cu.
#pragma once

#include "cuda/common/large_m.cuh"

namespace mtp::cuda {

struct LinearParams {
  Segment segments[2];  // of all rows
  StreamPlan plan;
  const void* weight;         // [n, segments * length]
  const void* bias;           // [n], dtype, or null
  const float* weight_scale;  // [n], or null
  void* out;                  // [rows, n], dtype
  void* workspace;            // linear_workspace(...) bytes
  int64_t rows, weight_stride;
  DType dtype, x_dtype;  // x_dtype: the finest of the segments'
  float eps, norm_offset;
  bool tiled;  // more than 64 rows go through the tiled product
};

int64_t linear_workspace(const LinearParams& p);
void launch_linear(const LinearParams& p, const char* op, cudaStream_t stream);

}  // namespace mtp::cuda

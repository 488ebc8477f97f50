// A linear layer over packed rows: what skinny_linear and eh_proj share on the host side. The
// kernels are compiled once, in skinny_linear.cu.
#pragma once

#include "cuda/common/weight_stream.cuh"

namespace mtp::cuda {

struct LinearParams {
  PackParams pack;  // segments of all rows; data and ids of row 0
  StreamPlan plan;
  const void* weight;         // [n, k]
  const void* bias;           // [n], dtype, or null
  const float* weight_scale;  // [n], or null
  void* out;                  // [rows, n], dtype
  void* workspace;            // linear_workspace(plan, rows) bytes
  int64_t rows, weight_stride;
  DType dtype;
};

int64_t linear_workspace(const StreamPlan& plan, int64_t rows);
void launch_linear(const LinearParams& p, const char* op, cudaStream_t stream);

}  // namespace mtp::cuda

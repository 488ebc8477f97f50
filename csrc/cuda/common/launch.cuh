// Launch checks: an error names the operator and CUDA's own words, and travels as an exception.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mtp::cuda {

inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
  }
}

inline void check_launch(const char* op) { check(cudaGetLastError(), op); }

}  // namespace mtp::cuda

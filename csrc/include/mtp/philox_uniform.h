// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), keyed per request and counted per token, so
// that a draw depends on (seed, stream, row, position, id) and on nothing else.
#pragma once

#include <cstdint>

#include "mtp/types.h"

namespace mtp {

struct PhiloxUniformParams {
  const int64_t* seeds;      // [B]
  const int64_t* positions;  // [B]
  float* out;                // [B, n]
  int64_t batch;
  int64_t n;
  uint32_t row;
  uint32_t stream;
};

namespace cpu {
void launch_philox_uniform(const PhiloxUniformParams& p);
}
namespace cuda {
void launch_philox_uniform(const PhiloxUniformParams& p, void* stream);
}

}  // namespace mtp

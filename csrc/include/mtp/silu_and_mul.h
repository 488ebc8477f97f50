// out = silu(gate) * up.
#pragma once

#include "mtp/types.h"

namespace mtp {

struct SiluAndMulParams {
  const void* gate_up;  // [T, 2 F]: gate, then up
  void* out;            // [T, F]
  DType dtype;          // of both
  int64_t rows;
  int64_t width;  // F
};

namespace cpu {
void launch_silu_and_mul(const SiluAndMulParams&);
}
namespace cuda {
void launch_silu_and_mul(const SiluAndMulParams&, void* stream);
}

}  // namespace mtp

// From a run-time element type to a C++ type.
#pragma once

#include <stdexcept>

#include "cpu/common/vec.h"

namespace mtp::cpu {
inline namespace MTP_ISA {

// Calls body(T{}) with T = float, F16 or BF16.
template <typename Body>
void with_float_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF32:
      return body(float{});
    case DType::kF16:
      return body(F16{});
    case DType::kBF16:
      return body(BF16{});
    default:
      throw std::runtime_error("mtp: element type must be f32, f16 or bf16");
  }
}

}  // namespace MTP_ISA
}  // namespace mtp::cpu

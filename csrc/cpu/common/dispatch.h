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

// Sixteen elements of a run-time type in f32, and back; lanes at or past n are zero, not touched.
inline F32x16 load_partial_as(DType dtype, const void* p, int64_t index, int64_t n) {
  F32x16 r;
  with_float_type(dtype, [&](auto type) {
    r = load_partial(static_cast<const decltype(type)*>(p) + index, n);
  });
  return r;
}
inline void store_partial_as(DType dtype, void* p, int64_t index, F32x16 a, int64_t n) {
  with_float_type(dtype,
                  [&](auto type) { store_partial(static_cast<decltype(type)*>(p) + index, a, n); });
}

}  // namespace MTP_ISA
}  // namespace mtp::cpu

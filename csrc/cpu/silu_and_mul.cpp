// Element by element; rows are whole vectors and a tail, whatever the number of rows, so the
// same element takes the same path in every batch.
#include "mtp/silu_and_mul.h"

#include "cpu/common/dispatch.h"
#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"
#include "cpu/common/vec.h"

namespace mtp::cpu::MTP_ISA {
namespace {

constexpr int64_t kElementsPerThread = 16384;

template <typename T>
void activate_row(const T* gate, const T* up, T* out, int64_t width) {
  const F32x16 one = broadcast(1.0f);
  for (int64_t i = 0; i < width; i += kLanes) {
    const F32x16 g = load_partial(gate + i, width - i), u = load_partial(up + i, width - i);
    store_partial(out + i, g / (one + exp(zero() - g)) * u, width - i);
  }
}

}  // namespace

void launch_silu_and_mul(const SiluAndMulParams& p) {
  with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(p.rows, std::max<int64_t>(1, kElementsPerThread / p.width),
                 [&](int64_t begin, int64_t end, int) {
                   for (int64_t row = begin; row < end; ++row) {
                     const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.width;
                     activate_row(gate, gate + p.width, static_cast<T*>(p.out) + row * p.width,
                                  p.width);
                   }
                 });
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_silu_and_mul, mtp::SiluAndMulParams)

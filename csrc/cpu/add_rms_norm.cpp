// Two passes over a row that stays in L1: add and sum the squares, then scale. A row is one
// thread's and its summation order is fixed, so its bits do not depend on the other rows.
#include "mtp/add_rms_norm.h"

#include <cmath>

#include "cpu/common/dispatch.h"
#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"
#include "cpu/common/vec.h"

namespace mtp::cpu::MTP_ISA {
namespace {

constexpr int64_t kElementsPerThread = 32768;

template <typename T>
void normalise_row(const AddRmsNormParams& p, int64_t row) {
  const int64_t n = p.hidden;
  float* residual = p.residual + row * n;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * n;

  F32x16 squares = zero();
  if (p.x) {
    const T* x = static_cast<const T*>(p.x) + row * n;
    for (int64_t i = 0; i < n; i += kLanes) {
      const F32x16 r = load_partial(residual + i, n - i) + load_partial(x + i, n - i);
      store_partial(residual + i, r, n - i);
      squares = fmadd(r, r, squares);
    }
  } else {
    for (int64_t i = 0; i < n; i += kLanes) {
      const F32x16 r = load_partial(residual + i, n - i);
      squares = fmadd(r, r, squares);
    }
  }

  const F32x16 scale =
      broadcast(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(n) + p.eps));
  const F32x16 offset = broadcast(p.gemma_norm ? 1.0f : 0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32x16 w = load_partial(weight + i, n - i) + offset;
    store_partial(out + i, load_partial(residual + i, n - i) * scale * w, n - i);
  }
}

}  // namespace

void launch_add_rms_norm(const AddRmsNormParams& p) {
  with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / p.hidden);
    parallel_for(p.rows, grain, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) normalise_row<T>(p, row);
    });
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_add_rms_norm, mtp::AddRmsNormParams)

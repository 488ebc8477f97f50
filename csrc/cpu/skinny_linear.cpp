// Threads share the weight rows. Each packs the activations for itself: that is cheaper than
// waiting for one of them to do it, and the copy is in its own cache.
#include "mtp/skinny_linear.h"

#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"
#include "cpu/common/weight_stream.h"

namespace mtp::cpu::MTP_ISA {
namespace {

template <typename W, typename X>
void run(const SkinnyLinearParams& p, const W* weight) {
  const auto* x = static_cast<const char*>(p.x);
  const int64_t x_bytes = p.x_stride * dtype_bytes(p.dtype);
  parallel_for(p.n, grain_of<W>(p.k), [&](int64_t begin, int64_t end, int) {
    for (int64_t first_row = 0; first_row < p.m; first_row += kMaxRows) {
      const PackedRows<W, X> packed(std::min<int64_t>(kMaxRows, p.m - first_row), p.k,
                                    [&](int64_t row, float* out) {
                                      widen_row(p.dtype, x + (first_row + row) * x_bytes, p.k, out);
                                    });
      const auto store_tile = [&](int64_t first, int64_t count, const float* tile) {
        for (int64_t j = 0; j < count; j += kLanes) {
          const int64_t left = count - j, n = first + j;
          F32x16 scale = broadcast(1.0f), bias = zero();
          if (p.weight_scale) scale = load_partial(p.weight_scale + n, left);
          if (p.bias) bias = load_partial_as(p.dtype, p.bias, n, left);
          for (int64_t m = 0; m < packed.rows(); ++m) {
            const F32x16 y = load(tile + m * kTileWidth + j) * scale + bias;
            store_partial_as(p.dtype, p.out, (first_row + m) * p.n + n, y, left);
          }
        }
      };
      stream_weights(weight, p.weight_stride, begin, end, packed, store_tile);
    }
  });
}

}  // namespace

void launch_skinny_linear(const SkinnyLinearParams& p) {
  with_weight_type(p.weight_dtype, p.weight, [&]<typename W>(const W* weight) {
    with_packed_type<W>(p.dtype, p.k, [&]<typename X>(X) { run<W, X>(p, weight); });
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_skinny_linear, mtp::SkinnyLinearParams)

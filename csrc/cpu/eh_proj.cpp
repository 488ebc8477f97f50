// skinny_linear with another prologue: what is packed is the concatenation, normalised in f32.
#include "mtp/eh_proj.h"

#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"
#include "cpu/common/weight_stream.h"

namespace mtp::cpu::MTP_ISA {
namespace {

int64_t read_index(DType dtype, const void* p, int64_t i) {
  return dtype == DType::kI32 ? static_cast<const int32_t*>(p)[i]
                              : static_cast<const int64_t*>(p)[i];
}

// concat(norm_e(embedding[id]), norm_h(hidden)) of one row, or the two halves exchanged.
void fill_row(const EhProjParams& p, int64_t row, float* out) {
  float* e = p.hidden_first ? out + p.h : out;
  float* h = p.hidden_first ? out : out + p.h;
  const float offset = p.gemma_norm ? 1.0f : 0.0f;

  const int64_t id = read_index(p.id_dtype, p.token_ids, row);
  const bool first = p.positions && read_index(p.position_dtype, p.positions, row) == 0;
  if (id >= 0 && id < p.v && !first) {
    const auto* embedding = static_cast<const char*>(p.embedding);
    widen_row(p.embedding_dtype,
              embedding + id * p.embedding_stride * dtype_bytes(p.embedding_dtype), p.h, e);
    if (p.enorm_weight) rms_norm_row(e, p.h, p.dtype, p.enorm_weight, offset, p.eps);
  } else {
    std::fill(e, e + p.h, 0.0f);
  }
  const auto* hidden = static_cast<const char*>(p.hidden);
  widen_row(p.dtype, hidden + row * p.hidden_stride * dtype_bytes(p.dtype), p.h, h);
  if (p.hnorm_weight) rms_norm_row(h, p.h, p.dtype, p.hnorm_weight, offset, p.eps);
}

template <typename W, typename X>
void run(const EhProjParams& p, const W* weight) {
  parallel_for(p.n, grain_of<W>(2 * p.h), [&](int64_t begin, int64_t end, int) {
    for (int64_t first_row = 0; first_row < p.t; first_row += kMaxRows) {
      const PackedRows<W, X> packed(
          std::min<int64_t>(kMaxRows, p.t - first_row), 2 * p.h,
          [&](int64_t row, float* out) { fill_row(p, first_row + row, out); });
      const auto store_tile = [&](int64_t first, int64_t count, const float* tile) {
        for (int64_t j = 0; j < count; j += kLanes) {
          const int64_t left = count - j, n = first + j;
          F32x16 bias = zero();
          if (p.bias) bias = load_partial_as(p.dtype, p.bias, n, left);
          for (int64_t m = 0; m < packed.rows(); ++m) {
            const F32x16 y = load(tile + m * kTileWidth + j) + bias;
            store_partial_as(p.dtype, p.out, (first_row + m) * p.n + n, y, left);
          }
        }
      };
      stream_weights(weight, p.weight_stride, begin, end, packed, store_tile);
    }
  });
}

}  // namespace

void launch_eh_proj(const EhProjParams& p) {
  with_float_type(p.weight_dtype, [&]<typename W>(W) {
    const auto* weight = static_cast<const W*>(p.weight);
    with_packed_type<W>(p.dtype, 2 * p.h, [&]<typename X>(X) { run<W, X>(p, weight); });
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_eh_proj, mtp::EhProjParams)

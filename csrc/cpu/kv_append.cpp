// A token's K and V rows go to one slot each: bound by the copy, so work is split over tokens.
#include "mtp/kv_append.h"

#include "cpu/common/isa.h"
#include "cpu/common/kv_rows.h"
#include "cpu/common/parallel.h"

namespace mtp::cpu::MTP_ISA {
namespace {

template <typename In, typename Stored>
void append_tokens(const KvAppendParams& p, int64_t b, int64_t first_row, int64_t begin,
                   int64_t end) {
  const In* k = static_cast<const In*>(p.k);
  const In* v = static_cast<const In*>(p.v);
  const int64_t length = p.cache_lens[b] > 0 ? p.cache_lens[b] : 0;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t position = length + t - first_row;
    const int64_t page = p.table.page(b, position / p.table.page_size);
    if (page < 0) continue;
    const int64_t slot = position % p.table.page_size;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      encode_row(k + t * p.k_token_stride + h * p.k_head_stride,
                 static_cast<Stored*>(p.k_cache.data) + p.k_cache.offset(page, slot, h), p.head_dim,
                 p.k_scale ? p.k_scale[h * p.k_scale_stride] : 1.0f);
      encode_row(v + t * p.v_token_stride + h * p.v_head_stride,
                 static_cast<Stored*>(p.v_cache.data) + p.v_cache.offset(page, slot, h), p.head_dim,
                 p.v_scale ? p.v_scale[h * p.v_scale_stride] : 1.0f);
    }
  }
}

template <typename In, typename Stored>
void append(const KvAppendParams& p) {
  constexpr int64_t kGrainBytes = 1 << 18;
  const int64_t token_bytes = 2 * p.kv_heads * p.head_dim * dtype_bytes(p.dtype);
  parallel_for(p.tokens, 1 + kGrainBytes / token_bytes, [&](int64_t begin, int64_t end, int) {
    for_each_request(p.cu_q_lens, p.batch, p.tokens, [&](int64_t b, RowRange rows) {
      append_tokens<In, Stored>(p, b, rows.begin, std::max(begin, rows.begin),
                                std::min(end, rows.end));
    });
  });
}

}  // namespace

void launch_kv_append(const KvAppendParams& p) {
  with_float_type(p.dtype, [&](auto type) {
    using In = decltype(type);
    if (p.cache_dtype == DType::kF8E4M3) return append<In, F8E4M3>(p);
    append<In, In>(p);
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_kv_append, mtp::KvAppendParams)

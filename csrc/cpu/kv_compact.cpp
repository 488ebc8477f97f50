// Slots only move down and in ascending order, so each (layer, request) walks its list once and
// no row is overwritten before it has been read.
#include "mtp/kv_compact.h"

#include <cstring>

#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"

namespace mtp::cpu::MTP_ISA {
namespace {

void move_slot(const KvCompactParams& p, const PagedRows& rows, void* data, int64_t from_page,
               int64_t from_slot, int64_t to_page, int64_t to_slot) {
  char* base = static_cast<char*>(data);
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    std::memmove(base + rows.offset(to_page, to_slot, h) * p.element_bytes,
                 base + rows.offset(from_page, from_slot, h) * p.element_bytes, p.head_bytes);
  }
}

void compact(const KvCompactParams& p, int64_t layer, int64_t b) {
  const int64_t length = p.cache_lens[b] > 0 ? p.cache_lens[b] : 0;
  const int64_t count = p.accept_lens[b] < p.max_accept ? p.accept_lens[b] : p.max_accept;
  const int64_t page_size = p.table.page_size;
  int64_t last = -1;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t at = b * p.max_accept + j;
    const int64_t index = p.index_dtype == DType::kI64
                              ? static_cast<const int64_t*>(p.accept_index)[at]
                              : static_cast<const int32_t*>(p.accept_index)[at];
    if (index <= last || index < j) continue;
    last = index;
    if (index == j || index >= p.table.capacity()) continue;
    const int64_t from = length + index, to = length + j;
    const int64_t from_page = p.table.page(b, from / page_size);
    const int64_t to_page = p.table.page(b, to / page_size);
    if (from_page < 0 || to_page < 0) continue;
    move_slot(p, p.k_cache, p.k_data[layer], from_page, from % page_size, to_page, to % page_size);
    move_slot(p, p.v_cache, p.v_data[layer], from_page, from % page_size, to_page, to % page_size);
  }
}

}  // namespace

void launch_kv_compact(const KvCompactParams& p) {
  constexpr int64_t kGrainBytes = 1 << 17;
  const int64_t bytes = 2 * p.max_accept * p.kv_heads * p.head_bytes;
  parallel_for(p.layers * p.batch, 1 + kGrainBytes / bytes, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) compact(p, i / p.batch, i % p.batch);
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_kv_compact, mtp::KvCompactParams)

// The paged KV cache as kernels see it. Layouts NHD and HND differ in strides only.
#pragma once

#include <cstdint>

#include "mtp/types.h"

namespace mtp {

// Keys or values of one layer. Strides in elements; a head's D elements are dense.
struct PagedRows {
  void* data;  // [P, page, Hkv, D] or [P, Hkv, page, D]
  int64_t page_stride;
  int64_t slot_stride;
  int64_t head_stride;

  MTP_HOST_DEVICE int64_t offset(int64_t page, int64_t slot, int64_t head) const {
    return page * page_stride + slot * slot_stride + head * head_stride;
  }
};

// Which page holds which positions of a request. Tables are data and may be wrong: a position
// past the table's capacity or an entry that is no page of the cache has no slot.
struct BlockTable {
  const int32_t* pages;  // [B, max_pages]
  int64_t stride;
  int64_t max_pages;
  int64_t num_pages;
  int64_t page_size;

  MTP_HOST_DEVICE int64_t capacity() const { return max_pages * page_size; }

  // The page of table entry `i` of request b, or -1.
  MTP_HOST_DEVICE int64_t page(int64_t b, int64_t i) const {
    if (i >= max_pages) return -1;
    const int64_t page = pages[b * stride + i];
    return page < num_pages ? page : -1;
  }
};

struct RowRange {
  int64_t begin, end;
};

// One step of turning cu_q_lens into rows: offsets are clamped to 0..total, never decreasing.
MTP_HOST_DEVICE int64_t clamp_offset(int64_t offset, int64_t last, int64_t total) {
  const int64_t x = offset < total ? offset : total;
  return x > last ? x : last;
}

}  // namespace mtp

// kv_compact: accepted tree slots move down, in every layer, by one launch.
//
// Each moved byte is read once and written once. A thread owns one 16-byte column of one head of
// one layer's K or V and walks its request's list upward. Slots only move down and the list
// ascends, so a slot is read before anything overwrites it, and no other thread touches the
// column: no shared memory, no barrier. The layers' pointers travel in the launch parameters.
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "mtp/kv_compact.h"

namespace mtp::cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ int64_t index_at(const KvCompactParams& p, int64_t i) {
  return p.index_dtype == DType::kI64 ? static_cast<const int64_t*>(p.accept_index)[i]
                                      : static_cast<const int32_t*>(p.accept_index)[i];
}

__global__ void __launch_bounds__(kThreads)
    kv_compact_kernel(const __grid_constant__ KvCompactParams p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t columns = p.head_bytes / 16;
  const int64_t head = column / columns;
  if (head >= p.kv_heads) return;
  const int64_t layer = blockIdx.y / 2;
  const bool values = blockIdx.y % 2;
  const PagedRows& rows = values ? p.v_cache : p.k_cache;
  char* data =
      static_cast<char*>(values ? p.v_data[layer] : p.k_data[layer]) + column % columns * 16;

  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z) {
    const int64_t length = max(p.cache_lens[b], 0);
    const int64_t count = min(static_cast<int64_t>(p.accept_lens[b]), p.max_accept);
    int64_t last = -1;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t index = index_at(p, b * p.max_accept + j);
      if (index <= last || index < j) continue;
      last = index;
      if (index == j || index >= p.table.capacity()) continue;
      const int64_t from = length + index, to = length + j;
      const int64_t from_page = p.table.page(b, from / p.table.page_size);
      const int64_t to_page = p.table.page(b, to / p.table.page_size);
      if (from_page < 0 || to_page < 0) continue;
      const int64_t source = rows.offset(from_page, from % p.table.page_size, head);
      const int64_t target = rows.offset(to_page, to % p.table.page_size, head);
      *reinterpret_cast<uint4*>(data + target * p.element_bytes) =
          *reinterpret_cast<const uint4*>(data + source * p.element_bytes);
    }
  }
}

}  // namespace

void launch_kv_compact(const KvCompactParams& p, void* stream) {
  const int64_t columns = p.kv_heads * (p.head_bytes / 16);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(columns, kThreads)),
                  static_cast<unsigned>(2 * p.layers),
                  static_cast<unsigned>(p.batch < 65535 ? p.batch : 65535));
  kv_compact_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_launch("kv_compact");
}

}  // namespace mtp::cuda

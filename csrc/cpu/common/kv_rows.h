// What the paged-cache kernels share: rows of a request, and a key or value row as it is stored.
#pragma once

#include <cstring>
#include <type_traits>

#include "cpu/common/vec.h"
#include "mtp/paged_cache.h"

namespace mtp::cpu {
inline namespace MTP_ISA {

// Calls body(b, range) for every request, empty ones included.
template <typename Body>
void for_each_request(const int32_t* cu_q_lens, int64_t batch, int64_t tokens, const Body& body) {
  int64_t begin = batch > 0 ? clamp_offset(cu_q_lens[0], 0, tokens) : 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t end = clamp_offset(cu_q_lens[b + 1], begin, tokens);
    body(b, RowRange{begin, end});
    begin = end;
  }
}

inline RowRange rows_of_request(const int32_t* cu_q_lens, int64_t b, int64_t tokens) {
  int64_t begin = 0;
  for (int64_t i = 0; i <= b; ++i) begin = clamp_offset(cu_q_lens[i], begin, tokens);
  return {begin, clamp_offset(cu_q_lens[b + 1], begin, tokens)};
}

// `dim` elements as the cache stores them; for e4m3, x / scale to nearest even, saturating.
template <typename In, typename Stored>
void encode_row(const In* in, Stored* out, int64_t dim, float scale) {
  if constexpr (std::is_same_v<In, Stored>) {
    std::memcpy(out, in, dim * sizeof(In));
  } else {
    const F32x16 divisor = broadcast(scale);
    for (int64_t d = 0; d < dim; d += kLanes) {
      store_partial(out + d, load_partial(in + d, dim - d) / divisor, dim - d);
    }
  }
}

// Calls body with a value of the storage type of `dtype`.
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
      __builtin_trap();  // the binding admits no other dtype
  }
}

}  // namespace MTP_ISA
}  // namespace mtp::cpu

// One read and one write of every element; v is copied.
#include "mtp/rope_qkv.h"

#include <cstring>

#include "cpu/common/dispatch.h"
#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"
#include "cpu/common/vec.h"

namespace mtp::cpu::MTP_ISA {
namespace {

constexpr int64_t kElementsPerThread = 32768;

template <typename T>
void rotate_heads(const T* in, T* out, int64_t heads, int64_t head_dim, const float* cos_sin) {
  const int64_t half = head_dim / 2;
  for (int64_t h = 0; h < heads; ++h, in += head_dim, out += head_dim) {
    for (int64_t i = 0; i < half; i += kLanes) {
      const int64_t n = half - i;
      const F32x16 c = load_partial(cos_sin + i, n), s = load_partial(cos_sin + half + i, n);
      const F32x16 a = load_partial(in + i, n), b = load_partial(in + half + i, n);
      store_partial(out + i, a * c - b * s, n);
      store_partial(out + half + i, b * c + a * s, n);
    }
  }
}

template <typename T>
void split_row(const RopeQkvParams& p, int64_t row) {
  const int64_t q_width = p.num_heads * p.head_dim, kv_width = p.num_kv_heads * p.head_dim;
  const T* in = static_cast<const T*>(p.qkv) + row * (q_width + 2 * kv_width);
  T* q = static_cast<T*>(p.q) + row * q_width;
  T* k = static_cast<T*>(p.k) + row * kv_width;
  T* v = static_cast<T*>(p.v) + row * kv_width;
  const int64_t position = p.positions[row];
  if (position >= 0 && position < p.num_positions) {
    const float* cos_sin = p.cos_sin + position * p.head_dim;
    rotate_heads(in, q, p.num_heads, p.head_dim, cos_sin);
    rotate_heads(in + q_width, k, p.num_kv_heads, p.head_dim, cos_sin);
  } else {
    std::memcpy(q, in, q_width * sizeof(T));
    std::memcpy(k, in + q_width, kv_width * sizeof(T));
  }
  std::memcpy(v, in + q_width + kv_width, kv_width * sizeof(T));
}

}  // namespace

void launch_rope_qkv(const RopeQkvParams& p) {
  with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t width = (p.num_heads + 2 * p.num_kv_heads) * p.head_dim;
    parallel_for(p.rows, std::max<int64_t>(1, kElementsPerThread / width),
                 [&](int64_t begin, int64_t end, int) {
                   for (int64_t row = begin; row < end; ++row) split_row<T>(p, row);
                 });
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_rope_qkv, mtp::RopeQkvParams)

// A C interface to csrc/cpu/common/vec.h, compiled once per instruction-set level by
// tests/test_cpu_vectors.py.
#include "cpu/common/vec.h"

using namespace mtp::cpu;

namespace {

template <typename T>
void widen(const T* in, float* vector, float* scalar, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(vector + i, load(in + i));
  for (int64_t i = 0; i < n; ++i) scalar[i] = to_float(in[i]);
}

template <typename T>
void narrow(const float* in, T* vector, T* scalar, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(vector + i, load(in + i));
  for (int64_t i = 0; i < n; ++i) from_float(in[i], scalar + i);
}

}  // namespace

extern "C" {
// Lengths are multiples of 16.
void widen_bf16(const BF16* in, float* v, float* s, int64_t n) { widen(in, v, s, n); }
void widen_f16(const F16* in, float* v, float* s, int64_t n) { widen(in, v, s, n); }
void widen_e4m3(const F8E4M3* in, float* v, float* s, int64_t n) { widen(in, v, s, n); }
void widen_i8(const int8_t* in, float* v, float* s, int64_t n) { widen(in, v, s, n); }
void narrow_bf16(const float* in, BF16* v, BF16* s, int64_t n) { narrow(in, v, s, n); }
void narrow_f16(const float* in, F16* v, F16* s, int64_t n) { narrow(in, v, s, n); }
void narrow_e4m3(const float* in, F8E4M3* v, F8E4M3* s, int64_t n) { narrow(in, v, s, n); }

// Eighteen results of sixteen lanes for one pair of vectors, then four scalars.
void lanes(const float* a, const float* b, int64_t count, float* out, uint32_t* bits) {
  const F32x16 x = load(a), y = load(b);
  const F32x16 results[] = {x + y,
                            x - y,
                            x * y,
                            x / y,
                            fmadd(x, y, y),
                            max(x, y),
                            min(x, y),
                            abs(x),
                            round_to_int(x),
                            pow2i(round_to_int(x)),
                            exp(x),
                            select(x < y, x, y),
                            select(x <= y, x, y),
                            select(x == y, x, zero()),
                            select(is_nan(x), zero(), x),
                            load_partial(a, count, -1.0f),
                            select(first_lanes(count), x, y),
                            floor(x)};
  for (const F32x16& r : results) {
    store(out, r);
    out += kLanes;
  }
  out[0] = reduce_add(x);
  out[1] = reduce_max(x);
  bits[0] = to_bits(x < y);
  bits[1] = to_bits(mask_from_bits(0xA5C3));
}

void exp_all(const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, exp(load(in + i)));
}
}

// csrc/cpu/common/race.h at one level against the scalar functions of mtp/exponential.h, for
// tests/test_cpu_vectors.py's levels. Counts the lanes that differ; `fused` says whether fmadd is.
#include <random>

#include "cpu/common/race.h"

extern "C" int race_probe(int fused) {
  using namespace mtp;
  using namespace mtp::cpu;
  std::mt19937_64 bits(1);
  int differences = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const auto key = philox::make_key(static_cast<int64_t>(bits()), static_cast<int64_t>(bits()),
                                      bits() % 3, bits() % 100);
    const auto first_block = static_cast<uint32_t>(bits() % (1u << 29));
    F32x16 uniforms[2];
    race_uniforms(key, first_block, uniforms);
    float u[32], e[32], z[16], w[16];
    for (int half = 0; half < 2; ++half) {
      store(u + 16 * half, uniforms[half]);
      store(e + 16 * half, exponential(uniforms[half]));
    }
    for (int i = 0; i < 32; ++i) {
      const float expected = race_uniform(philox::word(key, first_block * 4 + i));
      differences += u[i] != expected;
      differences += fused && e[i] != exponential(expected);
    }
    for (float& x : z) x = -static_cast<float>(bits() % 9000000) / 1e5f;
    store(w, exp_nonpositive(load(z)));
    FixedSum sum;
    sum.add(load(w));
    int64_t total = 0;
    for (int i = 0; i < 16; ++i) {
      differences += fused && w[i] != exp_nonpositive(z[i]);
      total += to_fixed(w[i]);
    }
    differences += total != sum.sum();
  }
  return differences;
}

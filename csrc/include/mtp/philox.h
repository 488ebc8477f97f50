// The random numbers of every sampling operator, the same on CPU and CUDA.
#pragma once

#include <cstdint>

#include "mtp/types.h"

namespace mtp::philox {

enum Stream : uint32_t { kDraft = 0, kAccept = 1, kFinal = 2 };

struct Words {
  uint32_t w[4];
};

// Everything of the counter and key but the id.
struct Key {
  uint32_t seed_lo, seed_hi;
  uint32_t stream_row;  // stream << 16 | row
  uint32_t position_lo, position_hi;
};

MTP_HOST_DEVICE Key make_key(int64_t seed, int64_t position, uint32_t stream, uint32_t row) {
  const auto s = static_cast<uint64_t>(seed), q = static_cast<uint64_t>(position);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), stream << 16 | row,
          static_cast<uint32_t>(q), static_cast<uint32_t>(q >> 32)};
}

// Ten rounds on counter (block, stream_row, position); ids 4*block .. 4*block+3 get w[0..3].
MTP_HOST_DEVICE Words block(const Key& key, uint32_t block_id) {
  constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t c0 = block_id, c1 = key.stream_row, c2 = key.position_lo, c3 = key.position_hi;
  uint32_t k0 = key.seed_lo, k1 = key.seed_hi;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kMul0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kMul1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

MTP_HOST_DEVICE uint32_t word(const Key& key, uint32_t id) { return block(key, id >> 2).w[id & 3]; }

// Strictly inside (0, 1): 23 bits, centred in their cells.
MTP_HOST_DEVICE float uniform(uint32_t w) {
  return (static_cast<float>(w >> 9) + 0.5f) * 1.1920928955078125e-07f;
}

}  // namespace mtp::philox

// Splits the rows of a fused projection into q, k and v and rotates q and k.
#pragma once

#include "mtp/types.h"

namespace mtp {

struct RopeQkvParams {
  const void* qkv;           // [T, (Hq + 2 Hkv) D]
  const int64_t* positions;  // [T]
  const float* cos_sin;      // [P, D]: cosines of D/2 frequencies, then sines
  void* q;                   // [T, Hq, D]
  void* k;                   // [T, Hkv, D]
  void* v;                   // [T, Hkv, D]
  DType dtype;               // of qkv, q, k and v
  int64_t rows;
  int64_t num_positions;  // P; rows at a position outside [0, P) are not rotated
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
};

namespace cpu {
void launch_rope_qkv(const RopeQkvParams&);
}
namespace cuda {
void launch_rope_qkv(const RopeQkvParams&, void* stream);
}

}  // namespace mtp

// Hardware approximations, where their error is below what the caller rounds to.
#pragma once

namespace mtp::cuda {

// 2^x to 2 ulp; exact for integers, 0 for -inf and below 2^-126.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace mtp::cuda

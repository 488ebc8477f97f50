#include "cpu/common/isa.h"

#include <cstdlib>
#include <cstring>

namespace mtp::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)

[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

[[maybe_unused]] bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
}

#endif  // __x86_64__

Isa best() {
#ifdef MTP_HAVE_AVX512_BF16
  if (has_avx512_bf16()) return Isa::kAvx512Bf16;
#endif
#ifdef MTP_HAVE_AVX512
  if (has_avx512()) return Isa::kAvx512;
#endif
#ifdef MTP_HAVE_AVX2
  if (has_avx2()) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

Isa choose() {
  const Isa found = best();
  const char* cap = std::getenv("MTP_CPU_ISA");
  if (cap == nullptr) return found;
  for (int level = 0; level < static_cast<int>(found); ++level) {
    if (std::strcmp(cap, kNames[level]) == 0) return static_cast<Isa>(level);
  }
  return found;
}

}  // namespace

Isa isa() {
  static const Isa level = choose();
  return level;
}

const char* isa_name(Isa level) { return kNames[static_cast<int>(level)]; }

const char* compiled_isa_levels() {
  return "generic"
#ifdef MTP_HAVE_AVX2
         ",avx2"
#endif
#ifdef MTP_HAVE_AVX512
         ",avx512"
#endif
#ifdef MTP_HAVE_AVX512_BF16
         ",avx512_bf16"
#endif
      ;
}

}  // namespace mtp::cpu

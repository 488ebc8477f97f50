#include "cpu/common/isa.h"

#include <cstdlib>
#include <cstring>

#ifdef MTP_HAVE_AMX
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mtp::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

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

#ifdef MTP_HAVE_AMX
// Tile registers are state that the system saves only for processes that have asked for them.
bool has_amx() {
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  if ((d & kNeeded) != kNeeded) return false;
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#endif  // __x86_64__

Isa best() {
#ifdef MTP_HAVE_AMX
  if (has_amx()) return Isa::kAmx;
#endif
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
#ifdef MTP_HAVE_AMX
         ",amx"
#endif
      ;
}

}  // namespace mtp::cpu

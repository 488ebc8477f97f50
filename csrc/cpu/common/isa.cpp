#include "cpu/common/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mtp::cpu {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "amx"};

#if defined(__x86_64__)

[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// AMX state is off until the process asks the kernel for it: ARCH_REQ_XCOMP_PERM, XTILEDATA.
[[maybe_unused]] bool has_amx() {
#if defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  __asm__("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(0));
  const bool tiles = (edx >> 24 & 1) && (edx >> 22 & 1) && (edx >> 25 & 1);
  __asm__("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(1));
  const bool bf16 = eax >> 5 & 1;
  constexpr int kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return has_avx512() && tiles && bf16 &&
         syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

#endif  // __x86_64__

Isa best() {
#ifdef MTP_HAVE_AMX
  if (has_amx()) return Isa::kAmx;
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
#ifdef MTP_HAVE_AMX
         ",amx"
#endif
      ;
}

}  // namespace mtp::cpu

// Instruction-set levels. Every csrc/cpu/<op>.cpp is compiled once per level, inside
// namespace mtp::cpu::MTP_ISA, and reached through one dispatcher that asks isa() at run time.
//
//   generic      whatever the compiler's baseline is; vectors are plain loops
//   avx2         AVX2, FMA, F16C
//   avx512       AVX-512 F, BW, DQ, VL
//   avx512_bf16  avx512 plus BF16 (dot products of bf16 pairs) and VBMI (tables of bytes)
//   amx          avx512_bf16 plus AMX: products of 16 x 16 tiles of bf16 pairs
#pragma once

namespace mtp::cpu {

enum class Isa { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The level in use: the best one that is compiled in, that the processor and the operating
// system offer, and that MTP_CPU_ISA (a name from above) does not forbid.
Isa isa();
const char* isa_name(Isa level);
// Comma-separated names of the levels compiled in.
const char* compiled_isa_levels();

}  // namespace mtp::cpu

// Written once at the end of csrc/cpu/<op>.cpp, outside any namespace: defines
// mtp::cpu::launch(const Params&), which jumps to the level in use.
#if MTP_ISA_LEVEL == 0

#ifdef MTP_HAVE_AVX2
#define MTP_IF_AVX2(...) __VA_ARGS__
#else
#define MTP_IF_AVX2(...)
#endif
#ifdef MTP_HAVE_AVX512
#define MTP_IF_AVX512(...) __VA_ARGS__
#else
#define MTP_IF_AVX512(...)
#endif
#ifdef MTP_HAVE_AVX512_BF16
#define MTP_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define MTP_IF_AVX512_BF16(...)
#endif
#ifdef MTP_HAVE_AMX
#define MTP_IF_AMX(...) __VA_ARGS__
#else
#define MTP_IF_AMX(...)
#endif

#define MTP_CPU_DISPATCH(launch, Params)                                         \
  namespace mtp::cpu {                                                           \
  MTP_IF_AVX2(namespace avx2 { void launch(const Params&); })                    \
  MTP_IF_AVX512(namespace avx512 { void launch(const Params&); })                \
  MTP_IF_AVX512_BF16(namespace avx512_bf16 { void launch(const Params&); })      \
  MTP_IF_AMX(namespace amx { void launch(const Params&); })                      \
  void launch(const Params& p) {                                                 \
    switch (isa()) {                                                             \
      MTP_IF_AMX(case Isa::kAmx : return amx::launch(p);)                        \
      MTP_IF_AVX512_BF16(case Isa::kAvx512Bf16 : return avx512_bf16::launch(p);) \
      MTP_IF_AVX512(case Isa::kAvx512 : return avx512::launch(p);)               \
      MTP_IF_AVX2(case Isa::kAvx2 : return avx2::launch(p);)                     \
      default:                                                                   \
        return generic::launch(p);                                               \
    }                                                                            \
  }                                                                              \
  }

#else
#define MTP_CPU_DISPATCH(launch, Params)
#endif

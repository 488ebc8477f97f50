// One Philox block yields the uniforms of four consecutive ids; requests are independent.
#include "mtp/philox_uniform.h"

#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"
#include "mtp/philox.h"

namespace mtp::cpu::MTP_ISA {

void launch_philox_uniform(const PhiloxUniformParams& p) {
  const int64_t blocks = ceil_div<int64_t>(p.n, 4);
  parallel_for(p.batch * blocks, 1024, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / blocks, block = i % blocks;
      const auto key = philox::make_key(p.seeds[b], p.positions[b], p.stream, p.row);
      const auto words = philox::block(key, static_cast<uint32_t>(block));
      float* out = p.out + b * p.n + block * 4;
      const int64_t count = std::min<int64_t>(4, p.n - block * 4);
      for (int64_t j = 0; j < count; ++j) out[j] = philox::uniform(words.w[j]);
    }
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_philox_uniform, mtp::PhiloxUniformParams)

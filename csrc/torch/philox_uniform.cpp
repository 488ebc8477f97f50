#include "mtp/philox_uniform.h"

#include "common.h"

namespace mtp::binding {
namespace {

at::Tensor philox_uniform(const at::Tensor& seeds, const at::Tensor& positions, int64_t row,
                          int64_t stream, int64_t n) {
  constexpr const char* kOp = "philox_uniform";
  const Checker check(kOp, seeds, "seeds");
  check.tensor("seeds", seeds, {{"B"}}, {at::kLong});
  const int64_t batch = seeds.size(0);
  check.tensor("positions", positions, {{"B", batch}}, {at::kLong});
  check.require(row >= 0 && row < 65536, "row must be in [0, 65536), got ", row);
  check.require(stream >= 0 && stream < 65536, "stream must be in [0, 65536), got ", stream);
  check.require(n >= 0 && n <= int64_t{1} << 34, "n must be in [0, 2^34], got ", n);

  at::Tensor out = at::empty({batch, n}, seeds.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  PhiloxUniformParams p;
  p.seeds = data_ptr<const int64_t>(seeds, "seeds");
  p.positions = data_ptr<const int64_t>(positions, "positions");
  p.out = data_ptr<float>(out, "out");
  p.batch = batch;
  p.n = n;
  p.row = static_cast<uint32_t>(row);
  p.stream = static_cast<uint32_t>(stream);
  run_on(kOp, seeds, p, &cpu::launch_philox_uniform, MTP_CUDA_LAUNCHER(launch_philox_uniform));
  return out;
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(philox_uniform, mtp::binding::philox_uniform)

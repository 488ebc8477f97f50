#include "mtp/silu_and_mul.h"

#include "common.h"

namespace mtp::binding {
namespace {

at::Tensor silu_and_mul(const at::Tensor& gate_up) {
  constexpr const char* kOp = "silu_and_mul";
  const Checker check(kOp, gate_up, "gate_up");
  check.tensor("gate_up", gate_up, {{"T"}, {"2 F"}}, {at::kFloat, at::kHalf, at::kBFloat16});
  check.require(gate_up.size(1) % 2 == 0, "gate_up's last dimension must be even, got ",
                gate_up.size(1));

  at::Tensor out = at::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
  if (out.numel() == 0) return out;
  SiluAndMulParams p;
  p.gate_up = data_ptr<const void>(gate_up, "gate_up");
  p.out = data_ptr<void>(out, "out");
  p.dtype = to_dtype(gate_up.scalar_type());
  p.rows = gate_up.size(0);
  p.width = gate_up.size(1) / 2;
  run_on(kOp, gate_up, p, &cpu::launch_silu_and_mul, MTP_CUDA_LAUNCHER(launch_silu_and_mul));
  return out;
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(silu_and_mul, mtp::binding::silu_and_mul)

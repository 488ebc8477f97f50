// Cross entropy with label smoothing and z-loss on the chunk loop of common/mtp_loss.h.
#include "mtp/linear_mtp_loss.h"

#include "cpu/common/isa.h"
#include "cpu/common/mtp_loss.h"

namespace mtp::cpu::MTP_ISA {
namespace {

struct CrossEntropy {
  const LinearMtpLossParams& p;

  bool counts(int64_t position) const {
    const int64_t label = p.labels[position];
    return label >= 0 && label < p.v && label != p.ignore_index;
  }

  const void* teacher(int64_t) const { return nullptr; }

  RowResult row(float* x, int64_t position, const Softmax& s, const float*, const Softmax&,
                bool gradient, float scale) const {
    const int64_t label = p.labels[position];
    const float logit = x[label];
    const double smoothing = p.label_smoothing, z = p.z_loss;
    double loss = s.lse - (1.0 - smoothing) * logit + z * s.lse * s.lse;
    if (smoothing > 0.0) {
      const double sum = sum_columns(p.v, [&](int64_t j) {
        return p.v - j < kLanes ? select(first_lanes(p.v - j), load(x + j), zero()) : load(x + j);
      });
      loss -= smoothing / static_cast<double>(p.v) * sum;
    }
    // Ties go to the lowest id, as in argmax.
    const bool correct = logit == s.max && std::find(x, x + label, logit) == x + label;
    if (gradient) {
      const float lse = static_cast<float>(s.lse);
      const float uniform = static_cast<float>(smoothing / static_cast<double>(p.v)) * scale;
      const float factor = static_cast<float>(1.0 + 2.0 * z * s.lse) * scale;
      write_gradient(p, x, [&](int64_t, F32x16 y) {
        return fmadd(broadcast(factor), exp(y - broadcast(lse)), broadcast(-uniform));
      });
      x[label] = column_gradient(
          p, logit,
          factor * std::exp(logit - lse) - uniform - static_cast<float>(1.0 - smoothing) * scale);
    }
    return {loss, correct ? 1.0 : 0.0};
  }

  void finish(int64_t depth, double correct, int64_t) const {
    p.num_correct[depth] = static_cast<int64_t>(correct);
  }
};

}  // namespace

void launch_linear_mtp_loss(const LinearMtpLossParams& p) {
  const CrossEntropy loss{p};
  MtpLossLoop(p, loss, false).run();
}

}  // namespace mtp::cpu::MTP_ISA

#if MTP_ISA_LEVEL == 0
int64_t mtp::cpu::linear_mtp_loss_workspace(const LinearMtpLossParams& p) {
  return LossWorkspace(p, false).bytes;
}
#endif

MTP_CPU_DISPATCH(launch_linear_mtp_loss, mtp::LinearMtpLossParams)

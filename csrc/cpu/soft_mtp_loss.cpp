// Distillation on the chunk loop of common/mtp_loss.h. With A = sum min(p, q), the gradient of
// KL(p || q) with respect to the logits is S q - p, S = sum p, and that of 1 - A is
// q (B - [q < p]), B = the sum of q where q < p.
#include "mtp/soft_mtp_loss.h"

#include "cpu/common/isa.h"
#include "cpu/common/mtp_loss.h"

namespace mtp::cpu::MTP_ISA {
namespace {

struct Distillation {
  const SoftMtpLossParams& p;

  bool counts(int64_t) const { return true; }

  const void* teacher(int64_t position) const {
    return static_cast<const char*>(p.teacher_hidden) +
           position * p.teacher_row_stride * dtype_bytes(p.dtype);
  }

  RowResult row(float* x, int64_t position, const Softmax& s, const float* teacher,
                const Softmax& t, bool gradient, float scale) const {
    return teacher ? dense_row(x, s, teacher, t, gradient, scale)
                   : sparse_row(x, position, s, gradient, scale);
  }

  void finish(int64_t depth, double overlap, int64_t tokens) const {
    p.acceptance[depth] = tokens ? static_cast<float>(overlap / static_cast<double>(tokens)) : 0.0f;
  }

 private:
  RowResult result(double kl, double overlap) const {
    return {p.kl_weight * kl + p.tv_weight * (1.0 - overlap), overlap};
  }

  RowResult dense_row(float* x, const Softmax& s, const float* teacher, const Softmax& t,
                      bool gradient, float scale) const {
    const F32x16 lse = broadcast(static_cast<float>(s.lse));
    const F32x16 teacher_lse = broadcast(static_cast<float>(t.lse));
    const auto q_of = [&](F32x16 logit) { return exp(logit - lse); };
    const auto p_of = [&](int64_t j) { return exp(load(teacher + j) - teacher_lse); };
    // Differences of logits, because p and q may be close everywhere.
    const double kl = s.lse - t.lse + sum_columns(p.v, [&](int64_t j) {
                        const F32x16 prob = p_of(j);
                        const F32x16 term = prob * (load(teacher + j) - load(x + j));
                        return select(prob == zero(), zero(), term);
                      });
    const double overlap =
        sum_columns(p.v, [&](int64_t j) { return min(q_of(load(x + j)), p_of(j)); });
    if (gradient) {
      const double below = sum_columns(p.v, [&](int64_t j) {
        const F32x16 q = q_of(load(x + j));
        return select(q < p_of(j), q, zero());
      });
      const F32x16 kl_scale = broadcast(p.kl_weight * scale);
      const F32x16 tv_scale = broadcast(p.tv_weight * scale);
      const F32x16 mean = broadcast(static_cast<float>(below));
      write_gradient(p, x, [&](int64_t j, F32x16 logit) {
        const F32x16 q = q_of(logit), prob = p_of(j);
        const F32x16 sign = select(q < prob, mean - broadcast(1.0f), mean);
        return fmadd(tv_scale * q, sign, kl_scale * (q - prob));
      });
    }
    return result(kl, overlap);
  }

  RowResult sparse_row(float* x, int64_t position, const Softmax& s, bool gradient,
                       float scale) const {
    const float* logprobs = p.teacher_logprobs + position * p.m;
    float logits[kMaxTeacherPairs];
    int64_t ids[kMaxTeacherPairs];
    float probs[kMaxTeacherPairs];
    int count = 0;
    double mass = 0.0, kl = 0.0, overlap = 0.0, below = 0.0;
    const auto q_of = [&](float logit) {
      return static_cast<float>(std::exp(static_cast<double>(logit) - s.lse));
    };
    for (int64_t i = 0; i < p.m; ++i) {
      const int64_t id = teacher_id(position * p.m + i);
      const float prob = std::exp(logprobs[i]);
      if (id < 0 || id >= p.v || prob == 0.0f) continue;
      const float logit = x[id], q = q_of(logit);
      mass += prob;
      kl += prob * (static_cast<double>(logprobs[i]) - (logit - s.lse));
      overlap += std::min(prob, q);
      if (q < prob) below += q;
      ids[count] = id;
      logits[count] = logit;
      probs[count++] = prob;
    }
    if (gradient) {
      const float kl_scale = p.kl_weight * scale, tv_scale = p.tv_weight * scale;
      const float factor = static_cast<float>(kl_scale * mass + tv_scale * below);
      const F32x16 lse = broadcast(static_cast<float>(s.lse));
      write_gradient(p, x,
                     [&](int64_t, F32x16 logit) { return broadcast(factor) * exp(logit - lse); });
      for (int i = 0; i < count; ++i) {
        const float q = q_of(logits[i]);
        const float g = factor * q - kl_scale * probs[i] - (q < probs[i] ? tv_scale * q : 0.0f);
        x[ids[i]] = column_gradient(p, logits[i], g);
      }
    }
    return result(kl, overlap);
  }

  int64_t teacher_id(int64_t i) const {
    return p.ids_dtype == DType::kI32 ? static_cast<const int32_t*>(p.teacher_ids)[i]
                                      : static_cast<const int64_t*>(p.teacher_ids)[i];
  }
};

}  // namespace

void launch_soft_mtp_loss(const SoftMtpLossParams& p) {
  const Distillation loss{p};
  MtpLossLoop(p, loss, p.teacher_hidden != nullptr).run();
}

}  // namespace mtp::cpu::MTP_ISA

#if MTP_ISA_LEVEL == 0
int64_t mtp::cpu::soft_mtp_loss_workspace(const SoftMtpLossParams& p) {
  return LossWorkspace(p, p.teacher_hidden != nullptr).bytes;
}
#endif

MTP_CPU_DISPATCH(launch_soft_mtp_loss, mtp::SoftMtpLossParams)

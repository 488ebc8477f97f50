// soft_mtp_loss: distillation of K depths with its gradients, on the chunk loop of
// common/mtp_loss.cuh, which says what moves. csrc/cpu/soft_mtp_loss.cpp states the gradients.
//
// With teacher hidden states the teacher's logits are made once per position of a chunk, for all
// depths that are compared with it, and a row reads them beside its own. Of a teacher of pairs each
// thread of a row holds one, in registers.
#include "mtp/soft_mtp_loss.h"

#include "cuda/common/mtp_loss.cuh"

namespace mtp::cuda {
namespace {

static_assert(kMaxTeacherPairs <= kLossThreads, "one thread per pair");

struct Distillation {
  static constexpr bool kTeacher = true;

  const void* ids;        // [T, m] or null
  const float* logprobs;  // [T, m]
  float* acceptance;      // [K]
  int64_t v, m;
  DType ids_dtype;
  float kl_weight, tv_weight;

  __device__ __forceinline__ bool counts(int64_t) const { return true; }

  template <typename T>
  __device__ __forceinline__ RowResult row(const LogitRow<T>& x, const Softmax& s, int64_t position,
                                           const float* teacher, const Softmax& t,
                                           float scale) const {
    return teacher ? dense_row(x, s, teacher, t, scale) : sparse_row(x, s, position, scale);
  }

  __device__ __forceinline__ void finish(int64_t depth, double overlap, int64_t tokens) const {
    acceptance[depth] =
        tokens > 0 ? static_cast<float>(overlap / static_cast<double>(tokens)) : 0.0f;
  }

 private:
  __device__ __forceinline__ RowResult result(float kl, float overlap) const {
    return {kl_weight * kl + tv_weight * (1.0f - overlap), overlap};
  }

  template <typename T>
  __device__ __forceinline__ RowResult dense_row(const LogitRow<T>& x, const Softmax& s,
                                                 const float* teacher, const Softmax& t,
                                                 float scale) const {
    const auto q_of = [&](float logit) { return expf(logit - s.max - s.log_sum); };
    const auto p_of = [&](int64_t j) { return expf(teacher[j] - t.max - t.log_sum); };
    // Differences of logits, because p and q may be close everywhere.
    const float shift = (s.max - t.max) + (s.log_sum - t.log_sum);
    float kl = 0.0f, overlap = 0.0f, below = 0.0f;
    x.each([&](int64_t j, float logit) {
      const float p = p_of(j), q = q_of(logit);
      if (p > 0.0f) kl = fmaf(p, (teacher[j] - logit) + shift, kl);
      overlap += fminf(p, q);
      if (q < p) below += q;
    });
    kl = x.sum(kl);
    overlap = x.sum(overlap);
    below = x.sum(below);
    if (x.gradient) {
      const float kl_scale = kl_weight * scale, tv_scale = tv_weight * scale;
      x.write([&](int64_t j, float logit) {
        const float p = p_of(j), q = q_of(logit);
        return kl_scale * (q - p) + tv_scale * q * (q < p ? below - 1.0f : below);
      });
    }
    return result(kl, overlap);
  }

  template <typename T>
  __device__ __forceinline__ RowResult sparse_row(const LogitRow<T>& x, const Softmax& s,
                                                  int64_t position, float scale) const {
    const auto q_of = [&](float logit) { return expf(logit - s.max - s.log_sum); };
    int64_t id = -1;
    float p = 0.0f, logit = 0.0f, q = 0.0f, kl = 0.0f;
    if (threadIdx.x < m) {
      const int64_t at = position * m + threadIdx.x;
      id = ids_dtype == DType::kI32 ? static_cast<const int32_t*>(ids)[at]
                                    : static_cast<const int64_t*>(ids)[at];
      const bool inside = id >= 0 && id < v;
      if (inside) p = expf(logprobs[at]);
      if (!inside || p == 0.0f) {
        id = -1;
      } else {
        logit = x.x[id];
        q = q_of(logit);
        kl = p * (logprobs[at] - ((logit - s.max) - s.log_sum));
      }
    }
    const float mass = x.sum(p), overlap = x.sum(fminf(p, q)), below = x.sum(q < p ? q : 0.0f);
    kl = x.sum(kl);
    if (x.gradient) {
      const float kl_scale = kl_weight * scale, tv_scale = tv_weight * scale;
      const float factor = kl_scale * mass + tv_scale * below;
      x.write([&](int64_t, float y) { return factor * q_of(y); });
      __syncthreads();
      if (id >= 0) {
        const float g = factor * q - kl_scale * p - (q < p ? tv_scale * q : 0.0f);
        x.gradient[id] = from_float<T>(g * x.slope(logit));
      }
    }
    return result(kl, overlap);
  }
};

}  // namespace

int64_t soft_mtp_loss_workspace(const SoftMtpLossParams& p) {
  return LossWorkspace(p, p.teacher_hidden != nullptr).bytes;
}

void launch_soft_mtp_loss(const SoftMtpLossParams& p, void* stream) {
  const Distillation loss = {p.teacher_ids, p.teacher_logprobs, p.acceptance, p.v,
                             p.m,           p.ids_dtype,        p.kl_weight,  p.tv_weight};
  launch_mtp_loss(p, loss, p.teacher_hidden, p.teacher_row_stride, stream, "soft_mtp_loss");
}

}  // namespace mtp::cuda

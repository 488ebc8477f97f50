// linear_mtp_loss: cross entropy of K depths with its gradients, on the chunk loop of
// common/mtp_loss.cuh, which says what moves. A row takes two passes over its f32 logits: one for
// maximum, sum of exponentials, argmax and the sum that label smoothing needs, one for the
// gradient. The label's column is written once more, by one thread.
#include "mtp/linear_mtp_loss.h"

#include "cuda/common/mtp_loss.cuh"

namespace mtp::cuda {
namespace {

struct CrossEntropy {
  static constexpr bool kTeacher = false;

  const int64_t* labels;  // [T]
  int64_t* num_correct;   // [K]
  int64_t v, ignore_index;
  float smoothing, z_loss;

  __device__ __forceinline__ bool counts(int64_t position) const {
    const int64_t label = labels[position];
    return label >= 0 && label < v && label != ignore_index;
  }

  template <typename T>
  __device__ __forceinline__ RowResult row(const LogitRow<T>& x, const Softmax& s, int64_t position,
                                           const float*, const Softmax&, float scale) const {
    const int64_t label = labels[position];
    const float logit = x.x[label], lse = s.lse();
    // The maximum is taken off before anything is added up, as log_softmax does.
    float loss = s.log_sum + (s.max - logit);
    if (smoothing > 0.0f) {
      loss += smoothing * (logit - s.sum / static_cast<float>(v));
    }
    loss += z_loss * lse * lse;
    if (x.gradient) {
      const float uniform = smoothing / static_cast<float>(v) * scale;
      const float factor = (1.0f + 2.0f * z_loss * lse) * scale;
      const auto g = [&](float y) { return factor * expf(y - s.max - s.log_sum) - uniform; };
      __syncthreads();  // every thread has the label's logit: the gradient may take its place
      x.write([&](int64_t, float y) { return g(y); });
      __syncthreads();
      if (threadIdx.x == 0) {
        const float at_label = g(logit) - (1.0f - smoothing) * scale;
        x.gradient[label] = from_float<T>(at_label * x.slope(logit));
      }
    }
    return {loss, s.argmax == label ? 1.0f : 0.0f};
  }

  __device__ __forceinline__ void finish(int64_t depth, double correct, int64_t) const {
    num_correct[depth] = static_cast<int64_t>(correct);
  }
};

}  // namespace

int64_t linear_mtp_loss_workspace(const LinearMtpLossParams& p) {
  return LossWorkspace(p, false).bytes;
}

void launch_linear_mtp_loss(const LinearMtpLossParams& p, void* stream) {
  const CrossEntropy loss = {p.labels,       p.num_correct,     p.v,
                             p.ignore_index, p.label_smoothing, p.z_loss};
  launch_mtp_loss(p, loss, nullptr, 0, stream, "linear_mtp_loss");
}

}  // namespace mtp::cuda

// Cross entropy of K prediction depths from hidden states: LM head, softmax and their gradients,
// chunk by chunk. The loss of a row is that of PyTorch's cross_entropy with label smoothing, plus
// z_loss * lse^2.
#pragma once

#include "mtp/mtp_loss.h"

namespace mtp {

struct LinearMtpLossParams : MtpLossParams {
  const int64_t* labels;  // [T]; outside [0, V) or ignore_index: the position does not count
  int64_t* num_correct;   // [K]
  int64_t ignore_index;
  float label_smoothing, z_loss;
};

namespace cpu {
int64_t linear_mtp_loss_workspace(const LinearMtpLossParams& p);
void launch_linear_mtp_loss(const LinearMtpLossParams& p);
}  // namespace cpu
namespace cuda {
int64_t linear_mtp_loss_workspace(const LinearMtpLossParams& p);
void launch_linear_mtp_loss(const LinearMtpLossParams& p, void* stream);
}  // namespace cuda

}  // namespace mtp

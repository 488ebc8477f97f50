// Distillation of K prediction depths: kl_weight * KL(p || q) + tv_weight * (1 - sum min(p, q)),
// where q is a row's softmax and p the teacher's: either the softmax of the teacher's hidden state
// through the same head, or m pairs of an id and a log-probability. sum min(p, q) is the chance
// that rejection sampling accepts a draft drawn from q.
#pragma once

#include "mtp/mtp_loss.h"

namespace mtp {

constexpr int kMaxTeacherPairs = 256;

struct SoftMtpLossParams : MtpLossParams {
  const void* teacher_hidden;     // [T, H], hidden's dtype, or null
  const void* teacher_ids;        // [T, m], int32 or int64, or null; outside [0, V): skipped
  const float* teacher_logprobs;  // [T, m], or null
  float* acceptance;              // [K]
  int64_t m, teacher_row_stride;
  DType ids_dtype;
  float kl_weight, tv_weight;
};

namespace cpu {
int64_t soft_mtp_loss_workspace(const SoftMtpLossParams& p);
void launch_soft_mtp_loss(const SoftMtpLossParams& p);
}  // namespace cpu
namespace cuda {
int64_t soft_mtp_loss_workspace(const SoftMtpLossParams& p);
void launch_soft_mtp_loss(const SoftMtpLossParams& p, void* stream);
}  // namespace cuda

}  // namespace mtp

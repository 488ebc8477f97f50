// The scalar rules of rejection_sample, written once for CPU and CUDA: which rows a request owns,
// which parameters are in range, when a draft is accepted.
#pragma once

#include "mtp/exponential.h"
#include "mtp/rejection_sample.h"

namespace mtp::rejection {

enum Status : int32_t { kBadTarget = 1, kBadDraftProb = 2, kBadDraftId = 4, kBadParameter = 8 };

MTP_HOST_DEVICE int64_t load_index(const void* p, DType type, int64_t i) {
  return type == DType::kI64 ? static_cast<const int64_t*>(p)[i]
                             : static_cast<const int32_t*>(p)[i];
}

// Drafts first .. first + n - 1 of the flat list; target rows row .. row + n.
struct Span {
  int64_t first;
  int64_t row;
  int n;
};

MTP_HOST_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

MTP_HOST_DEVICE Span span_of(const RejectionSampleParams& p, int64_t b) {
  const int64_t first = clamp(p.cu_draft_lens[b], 0, p.num_drafts);
  const int64_t end = clamp(p.cu_draft_lens[b + 1], first, p.num_drafts);
  return {first, first + b, static_cast<int>(clamp(end - first, 0, p.max_draft_len))};
}

// What is out of range is off, or greedy for the temperature, and sets a status bit.
struct Settings {
  bool greedy;
  float temperature;
  float inv_temperature;
  int64_t top_k;  // 0: off
  float top_p;    // 1: off
  float min_p;    // 0: off
  int32_t status;

  MTP_HOST_DEVICE bool filtered() const {
    return !greedy && (top_k > 0 || top_p < 1.0f || min_p > 0.0f);
  }
};

MTP_HOST_DEVICE Settings settings_of(const RejectionSampleParams& p, int64_t b) {
  Settings s{};
  float t = p.temperature ? p.temperature[b] : 0.0f;
  if (!(t >= 0.0f && t <= 3.4028234663852886e38f)) {
    t = 0.0f;
    s.status = kBadParameter;
  }
  s.greedy = t == 0.0f;
  s.temperature = t;
  s.inv_temperature = s.greedy ? 1.0f : inverse_temperature(t);
  const int64_t k = p.top_k ? p.top_k[b] : 0;
  s.top_k = k > 0 && k < p.vocab ? k : 0;
  s.top_p = p.top_p ? p.top_p[b] : 1.0f;
  if (!(s.top_p >= 0.0f && s.top_p <= 1.0f)) {
    s.top_p = 1.0f;
    s.status = kBadParameter;
  }
  s.min_p = p.min_p ? p.min_p[b] : 0.0f;
  if (!(s.min_p >= 0.0f && s.min_p <= 1.0f)) {
    s.min_p = 0.0f;
    s.status = kBadParameter;
  }
  return s;
}

// The smallest logit that min_p keeps.
MTP_HOST_DEVICE double min_p_bound(const Settings& s, float max_logit) {
  const double offset = static_cast<double>(s.temperature) * log(static_cast<double>(s.min_p));
  return static_cast<double>(max_logit) + offset;
}

// The fixed-point mass that a top_p prefix of `total` must reach; at least one token is kept.
MTP_HOST_DEVICE int64_t top_p_target(float top_p, int64_t total) {
  return clamp(static_cast<int64_t>(ceil(static_cast<double>(top_p) * static_cast<double>(total))),
               1, total);
}

MTP_HOST_DEVICE bool bad_prob(float q) { return !(q >= 0.0f && q <= 3.4028234663852886e38f); }

MTP_HOST_DEVICE bool accept_token(float u, float q, double p) {
  return static_cast<double>(u) * static_cast<double>(q) < p;
}

// Block verification (Sun et al. 2024): the running product after draft i, and the chance that the
// block ends there or later.
MTP_HOST_DEVICE double block_product(double product, double p, float q) {
  const double gain = product * p;
  return gain == 0.0 ? 0.0 : gain >= static_cast<double>(q) ? 1.0 : gain / static_cast<double>(q);
}

MTP_HOST_DEVICE double block_chance(double product, double residual_mass) {
  const double total = residual_mass + (1.0 - product);
  return total > 0.0 ? residual_mass / total : 1.0;
}

}  // namespace mtp::rejection

// The rules of rejection_sample, written once for CPU and CUDA: which rows a request owns, which
// parameters are in range, what a row's distribution comes down to, when a draft is accepted.
#pragma once

#include "mtp/exponential.h"
#include "mtp/rejection_sample.h"

namespace mtp::rejection {

// A row's weights are summed relative to the maximum of their own chunk first, on every processor.
constexpr int64_t kChunk = 1024;

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

// p(v) = weight(v) / sum over the kept ids, which are those with a logit above `cut`, or equal to
// it and an id up to `cut_id`; or one-hot on `best`.
struct Distribution {
  int64_t best;
  int64_t sum;
  int64_t cut_id;
  float cut;
  float max;
  float inv_temperature;
  bool one_hot;
  bool faulty;

  // Nothing filtered.
  MTP_HOST_DEVICE static Distribution whole(float inv_temperature) {
    return {0, 0, INT64_MAX, float_from_bits(0xff800000u), 0.0f, inv_temperature, false, false};
  }
  MTP_HOST_DEVICE double mass() const { return static_cast<double>(sum) / kFixedOne; }
  MTP_HOST_DEVICE bool kept(float logit, int64_t id) const {
    return logit > cut || (logit == cut && id <= cut_id);
  }
  MTP_HOST_DEVICE float weight_of(float logit, int64_t id) const {
    return kept(logit, id) ? weight(logit, max, inv_temperature) : 0.0f;
  }
  MTP_HOST_DEVICE double probability(float logit, int64_t id) const {
    if (one_hot) return id == best ? 1.0 : 0.0;
    return static_cast<double>(weight_of(logit, id)) / mass();
  }
};

// The order of the filters, descending logit then ascending id, as descending 64-bit keys.
struct Order {
  int id_bits = 1;

  MTP_HOST_DEVICE explicit Order(int64_t vocab) {
    while (vocab >> id_bits) ++id_bits;
  }
  MTP_HOST_DEVICE int bits() const { return 32 + id_bits; }
  MTP_HOST_DEVICE uint64_t last_id() const { return (uint64_t{1} << id_bits) - 1; }
  MTP_HOST_DEVICE uint64_t key(float logit, int64_t id) const {
    const uint32_t bits = bits_from_float(logit + 0.0f);  // -0 equals 0
    const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(ordered) << id_bits | (last_id() - static_cast<uint64_t>(id));
  }
  MTP_HOST_DEVICE float logit(uint64_t key) const {
    const auto ordered = static_cast<uint32_t>(key >> id_bits);
    return float_from_bits(ordered >> 31 ? ordered ^ 0x80000000u : ~ordered);
  }
  MTP_HOST_DEVICE int64_t id(uint64_t key) const {
    return static_cast<int64_t>(last_id() - (key & last_id()));
  }
};

// A digit of the radix descent over the keys.
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

// The smallest logit that min_p keeps.
MTP_HOST_DEVICE double min_p_bound(const Settings& s, float max_logit) {
  const double offset = static_cast<double>(s.temperature) * log(static_cast<double>(s.min_p));
  return static_cast<double>(max_logit) + offset;
}

// No candidate below this can be kept, as far as min_p and top_p tell.
MTP_HOST_DEVICE double lowest_candidate(const Settings& s, const Distribution& d, int64_t vocab) {
  double low = -3.4028234663852886e38;
  if (s.min_p > 0.0f) {
    const double bound = min_p_bound(s, d.max);
    low = bound > low ? bound : low;
  } else if (s.top_k == 0 && s.top_p < 0.9999f) {
    // vocab weights of e^-x together weigh less than what top_p drops.
    const double x = log(static_cast<double>(vocab) / ((1.0 - s.top_p) * d.mass())) + 0.01;
    const double bound = d.max - s.temperature * x;
    low = bound > low ? bound : low;
  }
  return low;
}

// The smallest f32 that is not below x.
MTP_HOST_DEVICE float round_up(double x) {
  const auto f = static_cast<float>(x);
  if (static_cast<double>(f) >= x) return f;
  const uint32_t bits = bits_from_float(f);
  return f == 0.0f ? 1.4e-45f : float_from_bits(f > 0.0f ? bits + 1 : bits - 1);
}

// The fixed-point mass that a top_p prefix of `total` must reach; at least one token is kept.
MTP_HOST_DEVICE int64_t top_p_target(float top_p, int64_t total) {
  return clamp(static_cast<int64_t>(ceil(static_cast<double>(top_p) * static_cast<double>(total))),
               1, total);
}

// The draft's distribution at one row: a dense row, a short list, or one id.
struct DraftRow {
  const float* dense;  // [V] or null
  const float* probs;  // [m] or null
  const void* ids;     // [m]
  DType ids_type;
  int64_t count;  // m; 1 if one-hot on `single`
  int64_t vocab;
  int64_t single;

  MTP_HOST_DEVICE int64_t id(int64_t j) const {
    return probs ? load_index(ids, ids_type, j) : single;
  }
  MTP_HOST_DEVICE float prob(int64_t j) const { return probs ? probs[j] : 1.0f; }
  // Entries outside the vocabulary do not count, and the first of equal ids decides.
  MTP_HOST_DEVICE bool counts(int64_t j) const {
    const int64_t mine = id(j);
    if (mine < 0 || mine >= vocab) return false;
    for (int64_t i = 0; i < j; ++i) {
      if (id(i) == mine) return false;
    }
    return true;
  }
  MTP_HOST_DEVICE float at(int64_t v) const {
    if (dense) return dense[v];
    for (int64_t j = 0; j < count; ++j) {
      if (id(j) == v) return prob(j);
    }
    return 0.0f;
  }
};

MTP_HOST_DEVICE int64_t draft_token(const RejectionSampleParams& p, const Span& span, int r) {
  return load_index(p.draft_token_ids, p.draft_token_type, span.first + r);
}

MTP_HOST_DEVICE DraftRow draft_row(const RejectionSampleParams& p, const Span& span, int r) {
  const int64_t index = span.first + r;
  DraftRow q{};
  q.vocab = p.vocab;
  if (!p.draft_probs) {
    q.count = 1;
    q.single = draft_token(p, span, r);
  } else if (!p.draft_ids) {
    q.dense = p.draft_probs + index * p.probs_stride;
  } else {
    q.count = p.sparse;
    q.probs = p.draft_probs + index * p.probs_stride;
    q.ids_type = p.draft_ids_type;
    q.ids = static_cast<const char*>(p.draft_ids) +
            index * p.ids_stride * dtype_bytes(p.draft_ids_type);
  }
  return q;
}

// A target row. T is the storage type; `to_float` of T is found where this is instantiated.
template <typename T>
struct TargetRow {
  const T* logits;
  const uint32_t* mask;  // null: everything is allowed
  int64_t vocab;

  MTP_HOST_DEVICE TargetRow(const RejectionSampleParams& p, const Span& span, int r)
      : logits(static_cast<const T*>(p.target_logits) + (span.row + r) * p.target_stride),
        mask(p.token_bitmask ? p.token_bitmask + (span.row + r) * p.mask_stride : nullptr),
        vocab(p.vocab) {}
  MTP_HOST_DEVICE bool allowed(int64_t id) const {
    return !mask || (mask[id / 32] >> (id % 32) & 1);
  }
};

MTP_HOST_DEVICE float coin(const RejectionSampleParams& p, int64_t b, int r) {
  const auto key = philox::make_key(p.seeds[b], p.positions[b], philox::kAccept, r);
  return philox::uniform(philox::word(key, 0));
}

// max(scale * p - q, 0) for a weight w, with a = scale / sum of the weights.
template <typename F>
MTP_HOST_DEVICE F residual_weight(F w, F a, F minus_q) {
  return max(fmadd(w, a, minus_q), splat<F>(0.0f));
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

// At most 64 pairs per request: everything stays in a few vectors on the stack.
#include "mtp/draft_sample.h"

#include <limits>

#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"
#include "cpu/common/race.h"
#include "mtp/rejection_rules.h"

namespace mtp::cpu::MTP_ISA {
namespace {

void sample(const DraftSampleParams& p, int64_t b) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const int k = static_cast<int>(p.k);
  const float* logits = p.topk_logits + b * k;
  float* probs = p.probs + b * k;
  int64_t ids[kMaxDraftTopK];
  float weights[kMaxDraftTopK];
  float top = -kInf;
  bool faulty = false;
  for (int j = 0; j < k; ++j) {
    ids[j] = rejection::load_index(p.topk_ids, p.ids_type, b * k + j);
    faulty |= !(logits[j] < kInf);
    if (logits[j] < kInf && logits[j] > top) top = logits[j];
  }
  faulty |= top == -kInf;

  const float t = p.temperature ? p.temperature[b] : 0.0f;
  if (faulty || !(t > 0.0f && t < kInf)) {
    // One-hot on the best finite logit, the lowest id on ties; on the lowest id if there is none.
    int best = -1;
    for (int j = 0; j < k; ++j) {
      const float logit = logits[j] < kInf ? logits[j] : -kInf;
      if (logit == top && (best < 0 || ids[j] < ids[best])) best = j;
      probs[j] = 0.0f;
    }
    probs[best] = 1.0f;
    p.token_ids[b] = ids[best];
    return;
  }

  const auto key = philox::make_key(p.seeds[b], p.positions[b], philox::kDraft, p.row);
  const float inverse = inverse_temperature(t);
  FixedSum sum;
  for (int j = 0; j < k; j += kLanes) {
    const F32x16 x = load_partial(logits + j, k - j, -kInf);
    const F32x16 w = weight(x, broadcast(top), broadcast(inverse));
    sum.add(w);
    store(weights + j, w);
  }
  const double total = static_cast<double>(sum.sum()) / kFixedOne;
  float best = -1.0f;
  for (int j = 0; j < k; ++j) {
    probs[j] = static_cast<float>(weights[j] / total);
    const uint32_t word = philox::word(key, static_cast<uint32_t>(ids[j]));
    const float score = probs[j] / exponential(mtp::race_uniform(word));
    if (score > best || (score == best && ids[j] < p.token_ids[b])) {
      best = score;
      p.token_ids[b] = ids[j];
    }
  }
}

}  // namespace

void launch_draft_sample(const DraftSampleParams& p) {
  parallel_for(p.batch, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) sample(p, b);
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_draft_sample, mtp::DraftSampleParams)

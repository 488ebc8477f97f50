// draft_sample: one draw from at most 64 pairs per request.
//
// A request is 64 logits and ids, so a warp holds it in registers, two pairs to a lane; launch
// latency is all there is to save. Maximum, integer sum and the race's winner are warp shuffles.
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "mtp/draft_sample.h"
#include "mtp/rejection_rules.h"

namespace mtp::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPairs = kMaxDraftTopK / kWarp;
constexpr float kInf = __builtin_huge_valf();

__global__ void __launch_bounds__(kThreads) draft_sample_kernel(const DraftSampleParams p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (b >= p.batch) return;
  const int lane = threadIdx.x % kWarp;
  const int k = static_cast<int>(p.k);
  const auto larger = [](float a, float c) { return fmaxf(a, c); };

  float logit[kPairs];
  int64_t id[kPairs];
  float top = -kInf;
  bool faulty = false;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int j = lane + i * kWarp;
    logit[i] = j < k ? p.topk_logits[b * k + j] : -kInf;
    id[i] = j < k ? rejection::load_index(p.topk_ids, p.ids_type, b * k + j) : INT64_MAX;
    const bool bad = !(logit[i] < kInf);
    faulty |= bad;
    if (bad) logit[i] = -kInf;
    top = fmaxf(top, logit[i]);
  }
  top = warp_reduce(top, larger);
  faulty = __any_sync(kAllLanes, faulty) || top == -kInf;

  const float t = p.temperature ? p.temperature[b] : 0.0f;
  const bool greedy = faulty || !(t > 0.0f && t < kInf);
  const float inverse = greedy ? 1.0f : inverse_temperature(t);
  const auto key = philox::make_key(p.seeds[b], p.positions[b], philox::kDraft, p.row);

  float w[kPairs];
  int64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    w[i] = greedy ? 0.0f : weight(logit[i], top, inverse);
    sum += to_fixed(w[i]);
  }
  sum = warp_reduce(sum, [](int64_t a, int64_t c) { return a + c; });
  const double total = static_cast<double>(sum) / kFixedOne;

  float score[kPairs];
  float best = -1.0f;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if (lane + i * kWarp >= k) {
      score[i] = -1.0f;
    } else if (greedy) {
      score[i] = logit[i] == top ? 1.0f : 0.0f;
    } else {
      w[i] = static_cast<float>(static_cast<double>(w[i]) / total);
      const uint32_t word = philox::word(key, static_cast<uint32_t>(id[i]));
      score[i] = w[i] / exponential(race_uniform(word));
    }
    best = fmaxf(best, score[i]);
  }
  best = warp_reduce(best, larger);
  int64_t winner = INT64_MAX;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if (score[i] == best && id[i] < winner) winner = id[i];
  }
  winner = warp_reduce(winner, [](int64_t a, int64_t c) { return a < c ? a : c; });

  if (greedy) {
    // One-hot on the first entry that holds the winner.
    unsigned at = kMaxDraftTopK;
#pragma unroll
    for (int i = kPairs - 1; i >= 0; --i) {
      if (score[i] == best && id[i] == winner) at = lane + i * kWarp;
    }
    at = warp_reduce(at, [](unsigned a, unsigned c) { return a < c ? a : c; });
#pragma unroll
    for (int i = 0; i < kPairs; ++i) w[i] = at == lane + i * kWarp ? 1.0f : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int j = lane + i * kWarp;
    if (j < k) p.probs[b * k + j] = w[i];
  }
  if (lane == 0) p.token_ids[b] = winner;
}

}  // namespace

void launch_draft_sample(const DraftSampleParams& p, void* stream) {
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(p.batch, kThreads / kWarp));
  draft_sample_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_launch("draft_sample");
}

}  // namespace mtp::cuda

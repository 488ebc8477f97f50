// rejection_sample: raw target logits to tokens in three launches.
//
// What must move is every target row once (64 requests x 4 rows x 128k bf16 = 66 MB, 20 us at
// 3.3 TB/s) and the final row of each request a second time, most likely from L2. Nothing as wide
// as the vocabulary is written.
//
//   row_stats   A warp reads 1024 logits into registers, takes their maximum, then the sum of their
//               weights relative to it, and writes 12 bytes. Few requests spread a row over many
//               CTAs; many leave each CTA a whole row.
//   row_filter  One CTA per row merges its chunks. If a filter is on, it reads only chunks whose
//               maximum passes a bound, keeps the candidates' keys (descending logit, ascending
//               id) in shared memory and descends them by radix to the last key kept, by count for
//               top_k and by mass for top_p. Candidates that do not fit are read again, until a
//               digit of the descent has thinned them out. Blocks with a dense q take their
//               residual masses here, in the last CTA of the request.
//   finish      Every CTA of a request decides the acceptance for itself from a few numbers per
//               row, then races its slice of the final row; the last to arrive writes the result.
//
// Weights are summed as integers and the race is a maximum: no order matters, so the split over
// CTAs does not either, and the CPU computes the same bits. 128 threads in row_stats and finish,
// 512 and 41 KB of shared memory in row_filter; at most 128 registers, no spills.
#include "cuda/common/chunk.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "mtp/rejection_rules.h"

namespace mtp::cuda {
namespace {

using namespace rejection;

constexpr int kStreamThreads = 128, kStreamWarps = kStreamThreads / kWarp;
constexpr int kFilterThreads = 512, kFilterWarps = kFilterThreads / kWarp;
constexpr int kListSize = 3072;
constexpr int kGroups = 8;  // of a chunk's lanes, whose maxima bound what top_k can keep
constexpr float kInf = __builtin_huge_valf();
constexpr int64_t kTargetCtas = 512;
using Word64 = unsigned long long;

struct Add {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};
struct Or {
  __device__ __forceinline__ int operator()(int a, int b) const { return a | b; }
};
struct Largest {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ Word64 operator()(Word64 a, Word64 b) const { return a > b ? a : b; }
};
struct Smallest {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const {
    return a < b ? a : b;
  }
};

// What CTAs of one request add up; zeroed by row_stats.
struct Tally {
  Word64 best;           // the race of p: score bits, then the complement of the id
  Word64 best_residual;  // the race of the residual
  unsigned rows_done;
  unsigned slices_done;
  unsigned bad_prob;
};

struct Workspace {
  int64_t rows;           // row slots per request
  int64_t chunks;         // per row
  float* chunk_max;       // [B, rows, chunks]
  float* group_max;       // [B, rows, chunks, kGroups], where top_k is on
  int64_t* chunk_sum;     // [B, rows, chunks]; -1: faulty
  Distribution* rows_of;  // [B, rows]
  double* residual;       // [B, rows], for blocks with a dense q
  unsigned* bad_prob;     // [B, rows], likewise
  Tally* tally;           // [B]

  __host__ __device__ int64_t slot(int64_t b, int64_t r) const { return b * rows + r; }
};

int64_t lay_out(const RejectionSampleParams& p, Workspace* w) {
  w->rows = (p.max_draft_len < p.num_drafts ? p.max_draft_len : p.num_drafts) + 1;
  w->chunks = ceil_div(p.vocab, kChunk);
  const int64_t slots = p.batch * w->rows;
  char* at = static_cast<char*>(p.workspace);
  int64_t bytes = 0;
  const auto take = [&](auto*& field, int64_t n) {
    field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(at + bytes);
    bytes += ceil_div<int64_t>(n * static_cast<int64_t>(sizeof(*field)), 16) * 16;
  };
  take(w->chunk_max, slots * w->chunks);
  take(w->group_max, p.top_k ? slots * w->chunks * kGroups : 0);
  take(w->chunk_sum, slots * w->chunks);
  take(w->rows_of, slots);
  take(w->residual, slots);
  take(w->bad_prob, slots);
  take(w->tally, p.batch);
  return bytes;
}

// What a whole CTA needs of its request: one thread reads it for all.
struct Header {
  Span span;
  Settings settings;

  __device__ __forceinline__ void load(const RejectionSampleParams& p, int64_t b) {
    if (threadIdx.x == 0) {
      span = span_of(p, b);
      settings = settings_of(p, b);
    }
    __syncthreads();
  }
};

// Chunks of one CTA when `items` rows share the device.
int64_t chunks_per_cta(int64_t items, int64_t chunks) {
  const int64_t even = ceil_div(items * chunks, kTargetCtas * kStreamWarps);
  const int64_t most = ceil_div<int64_t>(chunks, kStreamWarps);
  return (even < most ? even : most) * kStreamWarps;
}

// ---- statistics of the chunks ------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kStreamThreads)
    row_stats_kernel(const RejectionSampleParams p, const Workspace ws, int64_t per_cta) {
  const int64_t splits = ceil_div(ws.chunks, per_cta);
  const int64_t split = blockIdx.x % splits, slot = blockIdx.x / splits;
  const int64_t b = slot / ws.rows;
  const int r = static_cast<int>(slot % ws.rows);
  if (split == 0 && r == 0 && threadIdx.x == 0) ws.tally[b] = Tally{};
  __shared__ Header header;
  header.load(p, b);
  const Span span = header.span;
  if (r > span.n) return;
  const Settings settings = header.settings;
  const TargetRow<T> row(p, span, r);

  const int64_t stop = split * per_cta + per_cta;
  const int64_t end = stop < ws.chunks ? stop : ws.chunks;
  for (int64_t c = split * per_cta + threadIdx.x / kWarp; c < end; c += kStreamWarps) {
    const Chunk<T> chunk(row, c);
    float x[Chunk<T>::kPacks][Chunk<T>::kPer];
#pragma unroll
    for (int k = 0; k < Chunk<T>::kPacks; ++k) chunk.load(k, x[k]);
    float top = kMinusInf;
    bool bad = false;
#pragma unroll
    for (int k = 0; k < Chunk<T>::kPacks; ++k) {
#pragma unroll
      for (int j = 0; j < Chunk<T>::kPer; ++j) {
        bad |= !(x[k][j] < kInf);
        top = fmaxf(top, x[k][j]);
      }
    }
    if (settings.top_k > 0) {
#pragma unroll
      for (int offset = kWarp / 2; offset >= kGroups; offset /= 2) {
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, offset));
      }
      const int lane = threadIdx.x % kWarp;
      if (lane < kGroups) ws.group_max[(slot * ws.chunks + c) * kGroups + lane] = top;
    }
    top = warp_reduce(top, Largest());
    bad = __any_sync(kAllLanes, bad);
    int64_t sum = 0;
    if (!bad && !settings.greedy && top > kMinusInf) {
#pragma unroll
      for (int k = 0; k < Chunk<T>::kPacks; ++k) {
#pragma unroll
        for (int j = 0; j < Chunk<T>::kPer; ++j) {
          sum += to_fixed(weight(x[k][j], top, settings.inv_temperature));
        }
      }
      sum = warp_reduce(sum, Add());
    }
    if (threadIdx.x % kWarp == 0) {
      ws.chunk_max[slot * ws.chunks + c] = top;
      ws.chunk_sum[slot * ws.chunks + c] = bad ? -1 : sum;
    }
  }
}

// ---- a row's distribution ----------------------------------------------------------------------

struct FilterShared {
  Header header;
  Word64 bins[kBins];
  Word64 list[kListSize];
  Word64 words[kFilterWarps];
  int64_t ints[kFilterWarps];
  float floats[kFilterWarps];
  int flags[kFilterWarps];
  int listed;  // keys pushed, which may exceed kListSize
  int bin;
  int64_t above, size;
};

// The candidates of one row: their keys in `list` if they fit, else read again from the row.
template <typename T>
struct Candidates {
  const TargetRow<T>& row;
  const Distribution& d;
  const float* chunk_max;
  int64_t chunks;
  float low;
  FilterShared& s;
  Order order;

  // body(key) for every candidate that is in the row.
  template <typename Body>
  __device__ __forceinline__ void each_in_row(const Body& body) const {
    for (int64_t c = threadIdx.x / kWarp; c < chunks; c += kFilterWarps) {
      if (!(chunk_max[c] >= low)) continue;
      Chunk<T>(row, c).each([&](float x, int64_t id) {
        if (x >= low) body(order.key(x, id));
      });
    }
  }

  template <typename Body>
  __device__ __forceinline__ void each_in_list(int n, const Body& body) const {
    for (int i = threadIdx.x; i < n; i += kFilterThreads) body(s.list[i]);
  }

  __device__ __forceinline__ void push(uint64_t key) const {
    const int at = atomicAdd(&s.listed, 1);
    if (at < kListSize) s.list[at] = key;
  }

  __device__ __forceinline__ int64_t fixed_weight(uint64_t key) const {
    return to_fixed(weight(order.logit(key), d.max, d.inv_temperature));
  }

  // Fills the list; returns the number of candidates.
  __device__ __forceinline__ int collect() const {
    if (threadIdx.x == 0) s.listed = 0;
    __syncthreads();
    each_in_row([&](uint64_t key) { push(key); });
    __syncthreads();
    return s.listed;
  }

  __device__ __forceinline__ int64_t mass_from(uint64_t lowest, int listed) const {
    int64_t sum = 0;
    const auto add = [&](uint64_t key) {
      if (key >= lowest) sum += fixed_weight(key);
    };
    if (listed <= kListSize) {
      each_in_list(listed, add);
    } else {
      each_in_row(add);
    }
    return block_reduce<kFilterThreads>(sum, s.ints, Add());
  }

  // The bin, from the top, in which the running total first reaches the target.
  __device__ __forceinline__ void find_bin(int digits, int64_t above, int64_t target) const {
    constexpr int kEach = kBins / kFilterThreads;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int highest = (1 << digits) - 1 - static_cast<int>(threadIdx.x) * kEach;
    int64_t mine = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (highest - i >= 0) mine += static_cast<int64_t>(s.bins[highest - i]);
    }
    int64_t upto = mine;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, upto, offset);
      if (lane >= offset) upto += other;
    }
    if (lane == kWarp - 1) s.ints[warp] = upto;
    if (threadIdx.x == 0) s.bin = -1;
    __syncthreads();
    for (int w = 0; w < warp; ++w) upto += s.ints[w];
    int64_t running = above + upto - mine;
    if (running < target && running + mine >= target) {
      for (int i = 0; i < kEach; ++i) {
        const auto size = static_cast<int64_t>(s.bins[highest - i]);
        if (running + size >= target) {
          s.bin = highest - i;
          s.above = running;
          s.size = size;
          break;
        }
        running += size;
      }
    }
    __syncthreads();
  }

  // The largest key such that the candidates from it on number, or weigh, at least `target`; 0 if
  // all of them do not. Where the list could not hold the candidates, it is used for those that
  // share the digits found so far, once they fit.
  __device__ __forceinline__ uint64_t descend(int64_t target, bool by_mass, int listed) const {
    uint64_t prefix = 0;
    int64_t above = 0;
    int n = listed;
    for (int top = order.bits(); top > 0;) {
      const int digits = top < kDigitBits ? top : kDigitBits;
      const int shift = top - digits;
      const bool refill = n > kListSize;
      __syncthreads();
      for (int i = threadIdx.x; i < kBins; i += kFilterThreads) s.bins[i] = 0;
      if (threadIdx.x == 0) s.listed = 0;
      __syncthreads();
      const auto add = [&](uint64_t key) {
        if (key >> top != prefix) return;
        const int64_t size = by_mass ? fixed_weight(key) : 1;
        if (size)
          atomicAdd(&s.bins[key >> shift & ((1u << digits) - 1)], static_cast<Word64>(size));
        if (refill && prefix) push(key);
      };
      if (refill) {
        each_in_row(add);
      } else {
        each_in_list(n, add);
      }
      __syncthreads();
      if (refill) n = prefix ? s.listed : kListSize + 1;
      find_bin(digits, above, target);
      const int bin = s.bin;
      if (bin < 0) return 0;
      above = s.above;
      prefix = prefix << digits | static_cast<uint64_t>(bin);
      top = shift;
      if (!by_mass && above + s.size == target) return prefix << shift;
    }
    return prefix;
  }
};

template <typename T>
__device__ __forceinline__ void apply_filters(const TargetRow<T>& row, const Settings& settings,
                                              const float* chunk_max, const float* group_max,
                                              int64_t chunks, FilterShared& s, Distribution* d) {
  Candidates<T> candidates{row, *d, chunk_max, chunks, kMinusInf, s, Order(row.vocab)};
  float low = round_up(lowest_candidate(settings, *d, row.vocab));
  const int64_t groups = chunks * kGroups;
  if (settings.top_k > 0 && settings.top_k <= groups && groups <= kListSize) {
    // The k-th largest of the maxima of disjoint groups is at most the k-th largest of all.
    for (int i = threadIdx.x; i < groups; i += kFilterThreads) {
      s.list[i] = candidates.order.key(group_max[i], 0);
    }
    const uint64_t kth = candidates.descend(settings.top_k, false, static_cast<int>(groups));
    low = fmaxf(low, candidates.order.logit(kth));
  }
  candidates.low = low;
  const int count = candidates.collect();
  // The list survives as long as it was never overflowed.
  uint64_t last = 0;
  if (settings.top_k > 0 && count > settings.top_k) {
    last = candidates.descend(settings.top_k, false, count);
  }
  if (settings.top_p < 1.0f) {
    const bool whole = settings.top_k == 0 && settings.min_p == 0.0f;
    const int64_t total = whole ? d->sum : candidates.mass_from(last, count);
    const int64_t target = top_p_target(settings.top_p, total);
    const uint64_t reached = candidates.descend(target, true, count);
    last = reached > last ? reached : last;
  }
  d->sum = candidates.mass_from(last, count);
  d->cut = last ? candidates.order.logit(last) : low;
  if (last) d->cut_id = candidates.order.id(last);
}

// This thread's share of the mass of max(scale * p - q, 0), q dense.
template <typename T>
__device__ __forceinline__ int64_t dense_residual(const TargetRow<T>& row, const Distribution& d,
                                                  const float* q, float a, int64_t chunks) {
  int64_t sum = 0;
  for (int64_t c = threadIdx.x / kWarp; c < chunks; c += kFilterWarps) {
    Chunk<T>(row, c).each_beside(q, [&](float x, float draft, int64_t id) {
      const float w = x > kMinusInf ? d.weight_of(x, id) : 0.0f;
      if (w > 0.0f) sum += to_fixed(residual_weight(w, a, -draft));
    });
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kFilterThreads, 1)
    row_filter_kernel(const RejectionSampleParams p, const Workspace ws) {
  __shared__ FilterShared s;
  const int64_t slot = blockIdx.x, b = slot / ws.rows;
  const int r = static_cast<int>(slot % ws.rows);
  s.header.load(p, b);
  const Span span = s.header.span;
  if (r > span.n) return;
  const Settings settings = s.header.settings;
  const TargetRow<T> row(p, span, r);
  const float* chunk_max = ws.chunk_max + slot * ws.chunks;
  const int64_t* chunk_sum = ws.chunk_sum + slot * ws.chunks;

  Distribution d = Distribution::whole(settings.inv_temperature);
  float top = kMinusInf;
  int bad = 0;
  for (int64_t c = threadIdx.x; c < ws.chunks; c += kFilterThreads) {
    top = fmaxf(top, chunk_max[c]);
    bad |= chunk_sum[c] < 0;
  }
  d.max = block_reduce<kFilterThreads>(top, s.floats, Largest());
  d.faulty = block_reduce<kFilterThreads>(bad, s.flags, Or()) || d.max == kMinusInf;
  d.one_hot = d.faulty || settings.greedy;

  if (d.one_hot) {
    // The best finite allowed entry, lowest id on ties; id 0 if there is none. A row without faults
    // has it in the first chunk that holds the maximum.
    int64_t from = 0, end = ws.chunks;
    if (!d.faulty) {
      from = ws.chunks;
      for (int64_t c = threadIdx.x; c < ws.chunks; c += kFilterThreads) {
        if (chunk_max[c] == d.max && c < from) from = c;
      }
      from = block_reduce<kFilterThreads>(from, s.ints, Smallest());
      end = from + 1;
    }
    const Order order(p.vocab);
    Word64 best = 0;
    for (int64_t c = from + threadIdx.x / kWarp; c < end; c += kFilterWarps) {
      Chunk<T>(row, c).each([&](float x, int64_t id) {
        const Word64 key = x < kInf && x > kMinusInf ? order.key(x, id) : 0;
        if (key > best) best = key;
      });
    }
    best = block_reduce<kFilterThreads>(best, s.words, Largest());
    d.best = best ? order.id(best) : 0;
  } else {
    int64_t sum = 0;
    for (int64_t c = threadIdx.x; c < ws.chunks; c += kFilterThreads) {
      if (chunk_sum[c] == 0) continue;
      sum += rescale_fixed(chunk_sum[c], weight(chunk_max[c], d.max, d.inv_temperature));
    }
    d.sum = block_reduce<kFilterThreads>(sum, s.ints, Add());
    if (settings.filtered()) {
      apply_filters(row, settings, chunk_max, ws.group_max + slot * ws.chunks * kGroups, ws.chunks,
                    s, &d);
    }
  }
  if (threadIdx.x == 0) ws.rows_of[slot] = d;

  const bool dense = p.draft_probs && !p.draft_ids;
  if (!(p.block && dense) || settings.greedy) return;

  int bad_prob_seen = 0;
  if (r < span.n) {
    const float* q = draft_row(p, span, r).dense;
    for (int64_t v = threadIdx.x; v < p.vocab; v += kFilterThreads) {
      bad_prob_seen |= bad_prob(q[v]);
    }
  }
  bad_prob_seen = block_reduce<kFilterThreads>(bad_prob_seen, s.flags, Or());
  if (threadIdx.x == 0) {
    ws.bad_prob[slot] = bad_prob_seen;
    __threadfence();
    s.bin = atomicAdd(&ws.tally[b].rows_done, 1u) == static_cast<unsigned>(span.n);
    __threadfence();
  }
  __syncthreads();
  if (!s.bin) return;

  // The last CTA of the request: residual masses of rows 1 .. n - 1.
  double product = 1.0;
  for (int i = 1; i < span.n; ++i) {
    const int64_t token = draft_token(p, span, i - 1);
    const int64_t before = ws.slot(b, i - 1);
    if (token < 0 || token >= p.vocab || __ldcg(&ws.bad_prob[before])) return;
    const Distribution judged = ws.rows_of[before];
    const float logit = logit_at(TargetRow<T>(p, span, i - 1), token);
    product = block_product(product, judged.probability(logit, token),
                            draft_row(p, span, i - 1).dense[token]);
    const Distribution here = ws.rows_of[ws.slot(b, i)];
    const float* q = draft_row(p, span, i).dense;
    double mass;
    if (here.one_hot) {
      const double rest = product - static_cast<double>(q[here.best]);
      mass = rest > 0.0 ? rest : 0.0;
    } else {
      const auto a = static_cast<float>(product / here.mass());
      const int64_t sum = dense_residual(TargetRow<T>(p, span, i), here, q, a, ws.chunks);
      const int64_t total = block_reduce<kFilterThreads>(sum, s.ints, Add());
      mass = static_cast<double>(total) / kFixedOne;
    }
    if (threadIdx.x == 0) ws.residual[ws.slot(b, i)] = mass;
  }
}

// ---- acceptance --------------------------------------------------------------------------------

struct Decision {
  int accepted;
  int status;
  int residual;  // whether the final token comes from max(scale * p - q, 0)
  double scale;
};

struct FinishShared {
  Header header;
  Decision decision;
  Distribution d;
  DraftRow q;
  philox::Key key;
  int ints[kStreamWarps];
  Word64 words[kStreamWarps];
  unsigned last;
  // The listed q of the final row, and a bit for each id modulo 4096 in it.
  int64_t ids[kMaxSparse];
  float probs[kMaxSparse];
  unsigned filter[128];
};

template <typename T>
__device__ __forceinline__ double token_probability(const RejectionSampleParams& p,
                                                    const Span& span, int r, const Distribution& d,
                                                    int64_t token) {
  return d.probability(logit_at(TargetRow<T>(p, span, r), token), token);
}

// Token by token: rows are judged side by side, and the first that stops decides.
template <typename T>
__device__ __forceinline__ void decide_tokens(const RejectionSampleParams& p, const Workspace& ws,
                                              int64_t b, const Span& span, const Settings& settings,
                                              FinishShared& s) {
  int status = settings.status;
  for (int base = 0;; base += kStreamThreads) {
    const int r = base + static_cast<int>(threadIdx.x);
    int stop = INT32_MAX, bits = 0, residual = 0, target_bits = 0;
    if (r <= span.n) {
      const Distribution& d = ws.rows_of[ws.slot(b, r)];
      target_bits = d.faulty ? kBadTarget : 0;
      if (r == span.n) {
        stop = r;
      } else {
        const int64_t token = draft_token(p, span, r);
        if (token < 0 || token >= p.vocab) {
          stop = r;
          bits = kBadDraftId;
        } else if (settings.greedy) {
          if (token != d.best) stop = r;
        } else {
          const float q = draft_row(p, span, r).at(token);
          if (bad_prob(q)) {
            stop = r;
            bits = kBadDraftProb;
          } else if (!accept_token(coin(p, b, r), q, token_probability<T>(p, span, r, d, token))) {
            stop = r;
            residual = 1;
          }
        }
      }
    }
    const int first =
        block_reduce<kStreamThreads>(stop, s.ints, [](int a, int c) { return a < c ? a : c; });
    if (r == first) {
      s.decision.accepted = first;
      s.decision.residual = residual;
      s.decision.scale = 1.0;
    }
    if (r > first) target_bits = 0;
    if (r != first) bits = 0;
    status |= block_reduce<kStreamThreads>(bits | target_bits, s.ints, Or());
    if (first != INT32_MAX) break;
  }
  if (threadIdx.x == 0) s.decision.status = status;
}

// Block verification, by one warp: the lanes share the entries of a listed q.
template <typename T>
__device__ __forceinline__ void decide_block(const RejectionSampleParams& p, const Workspace& ws,
                                             int64_t b, const Span& span, const Settings& settings,
                                             FinishShared& s) {
  const int lane = threadIdx.x;
  const bool dense = p.draft_probs && !p.draft_ids;
  int status = settings.status;
  int n = 0;
  for (; n < span.n; ++n) {
    const int64_t token = draft_token(p, span, n);
    if (token < 0 || token >= p.vocab) {
      status |= kBadDraftId;
      break;
    }
    bool bad = false;
    if (dense) {
      bad = ws.bad_prob[ws.slot(b, n)];
    } else {
      const DraftRow q = draft_row(p, span, n);
      for (int64_t j = lane; j < q.count; j += kWarp) bad |= q.counts(j) && bad_prob(q.prob(j));
      bad = __any_sync(kAllLanes, bad);
    }
    if (bad) {
      status |= kBadDraftProb;
      break;
    }
  }
  double product = 1.0, scale = 1.0;
  int accepted = 0;
  if (ws.rows_of[ws.slot(b, 0)].faulty) status |= kBadTarget;
  for (int i = 1; i <= n; ++i) {
    const int64_t token = draft_token(p, span, i - 1);
    const double probability =
        token_probability<T>(p, span, i - 1, ws.rows_of[ws.slot(b, i - 1)], token);
    product = block_product(product, probability, draft_row(p, span, i - 1).at(token));
    const Distribution d = ws.rows_of[ws.slot(b, i)];
    if (d.faulty) status |= kBadTarget;
    double chance = product;
    if (i < n) {
      double mass;
      const DraftRow q = draft_row(p, span, i);
      if (dense) {
        mass = ws.residual[ws.slot(b, i)];
      } else if (d.one_hot) {
        mass = product - static_cast<double>(q.at(d.best));
      } else {
        // All of p but what the listed ids take away.
        const TargetRow<T> row(p, span, i);
        const auto a = static_cast<float>(product / d.mass());
        int64_t taken = 0;
        for (int64_t j = lane; j < q.count; j += kWarp) {
          if (!q.counts(j)) continue;
          const float w = d.weight_of(logit_at(row, q.id(j)), q.id(j));
          taken += to_fixed(mtp::min(__fmul_rn(w, a), q.prob(j)));
        }
        taken = warp_reduce(taken, Add());
        mass = product - static_cast<double>(taken) / kFixedOne;
      }
      chance = block_chance(product, mass > 0.0 ? mass : 0.0);
    }
    if (static_cast<double>(coin(p, b, i - 1)) < chance) {
      accepted = i;
      scale = product;
    }
  }
  if (lane == 0) s.decision = {accepted, status, accepted < n, scale};
}

// ---- the race ----------------------------------------------------------------------------------

struct Contender {
  float score = 0.0f;
  int64_t id = 0;

  // Ids come in ascending order, so ties stay with the lowest.
  __device__ __forceinline__ void meet(float w, float u, int64_t v) {
    // exponential(u) >= u: the cheap bound settles almost every id.
    if (!(w > u * score * 0.9999f)) return;
    const float mine = w / exponential(u);
    if (mine > score) {
      score = mine;
      id = v;
    }
  }
  __device__ __forceinline__ Word64 packed() const {
    if (!(score > 0.0f)) return 0;
    return static_cast<Word64>(__float_as_uint(score)) << 32 |
           (0xffffffffu - static_cast<unsigned>(id));
  }
};

__device__ __forceinline__ int64_t id_of(Word64 packed) {
  return static_cast<int64_t>(0xffffffffu - static_cast<unsigned>(packed));
}

// The uniforms of a lane's consecutive ids: a Philox block serves four of them.
struct LaneUniforms {
  philox::Key key;
  int64_t block = -1;
  philox::Words words;

  __device__ __forceinline__ float at(int64_t id) {
    if (id >> 2 != block) {
      block = id >> 2;
      words = philox::block(key, static_cast<uint32_t>(block));
    }
    const auto j = static_cast<uint32_t>(id) & 3;
    const uint32_t low = j & 1 ? words.w[1] : words.w[0];
    const uint32_t high = j & 1 ? words.w[3] : words.w[2];
    return race_uniform(j & 2 ? high : low);
  }
};

__device__ __forceinline__ void write_result(const RejectionSampleParams& p, int64_t b,
                                             const Span& span, int accepted, int64_t token,
                                             int status) {
  const int64_t width = p.max_draft_len + 1;
  for (int64_t i = threadIdx.x; i < width; i += kStreamThreads) {
    int64_t value = -1;
    if (i < accepted) value = draft_token(p, span, static_cast<int>(i));
    if (i == accepted) value = token;
    p.token_ids[b * width + i] = static_cast<int32_t>(value);
  }
  if (threadIdx.x == 0) {
    p.num_accepted[b] = accepted;
    p.status[b] = status;
  }
}

template <typename T>
__global__ void __launch_bounds__(kStreamThreads, 4)
    finish_kernel(const RejectionSampleParams p, const Workspace ws, int64_t per_cta) {
  __shared__ FinishShared s;
  const int64_t splits = ceil_div(ws.chunks, per_cta);
  const int64_t split = blockIdx.x % splits, b = blockIdx.x / splits;
  s.header.load(p, b);
  const Span span = s.header.span;
  const Settings settings = s.header.settings;
  if (!p.block || settings.greedy) {
    decide_tokens<T>(p, ws, b, span, settings, s);
  } else if (threadIdx.x < kWarp) {
    decide_block<T>(p, ws, b, span, settings, s);
  }
  __syncthreads();
  const Decision decision = s.decision;
  const int r = decision.accepted;
  if (threadIdx.x == 0) {
    s.d = ws.rows_of[ws.slot(b, r)];
    s.q = decision.residual ? draft_row(p, span, r) : DraftRow{};
    s.key = philox::make_key(p.seeds[b], p.positions[b], philox::kFinal, r);
  }
  __syncthreads();
  const Distribution d = s.d;
  const DraftRow q = s.q;
  const bool listed = decision.residual && !q.dense;

  // A listed q of a row that is one-hot has no race to run, but still a status to give.
  int bad = 0;
  if (listed) {
    for (int i = threadIdx.x; i < 128; i += kStreamThreads) s.filter[i] = 0;
    __syncthreads();
    for (int64_t j = threadIdx.x; j < q.count; j += kStreamThreads) {
      const bool counts = q.counts(j);
      s.ids[j] = counts ? q.id(j) : -1;
      s.probs[j] = q.prob(j);
      if (!counts) continue;
      bad |= bad_prob(q.prob(j));
      atomicOr(&s.filter[s.ids[j] >> 5 & 127], 1u << (s.ids[j] & 31));
    }
    bad = block_reduce<kStreamThreads>(bad, s.ints, Or());
  }
  if (d.one_hot && !q.dense) {
    const int status = decision.status | (bad ? kBadDraftProb : 0);
    if (split == 0) write_result(p, b, span, r, d.best, status);
    return;
  }

  const TargetRow<T> row(p, span, r);
  const float* chunk_max = ws.chunk_max + ws.slot(b, r) * ws.chunks;
  const auto a = static_cast<float>(decision.scale / d.mass());
  LaneUniforms uniforms{s.key};
  Contender best, best_residual;
  const int64_t stop = split * per_cta + per_cta;
  const int64_t end = stop < ws.chunks ? stop : ws.chunks;
  for (int64_t c = split * per_cta + threadIdx.x / kWarp; c < end; c += kStreamWarps) {
    if (!q.dense && !(chunk_max[c] >= d.cut)) continue;
    Chunk<T>(row, c).each_beside(q.dense, [&](float x, float draft, int64_t id) {
      bad |= bad_prob(draft);
      const float w = !d.one_hot && x > kMinusInf ? d.weight_of(x, id) : 0.0f;
      if (!(w > 0.0f)) return;
      const float u = uniforms.at(id);
      best.meet(w, u, id);
      if (!decision.residual) return;
      if (listed && (s.filter[id >> 5 & 127] >> (id & 31) & 1)) {
        for (int j = 0; j < q.count; ++j) {
          if (s.ids[j] == id) draft = s.probs[j];
        }
      }
      best_residual.meet(residual_weight(w, a, -draft), u, id);
    });
  }

  Tally* tally = ws.tally + b;
  const Word64 won = block_reduce<kStreamThreads>(best.packed(), s.words, Largest());
  const Word64 won_residual =
      block_reduce<kStreamThreads>(best_residual.packed(), s.words, Largest());
  bad = block_reduce<kStreamThreads>(bad, s.ints, Or());
  if (threadIdx.x == 0) {
    if (won) atomicMax(&tally->best, won);
    if (won_residual) atomicMax(&tally->best_residual, won_residual);
    if (bad) atomicOr(&tally->bad_prob, 1u);
    __threadfence();
    s.last = atomicAdd(&tally->slices_done, 1u) == static_cast<unsigned>(splits) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!s.last) return;
  const bool bad_q = __ldcg(&tally->bad_prob);
  const Word64 from_p = __ldcg(&tally->best), from_residual = __ldcg(&tally->best_residual);
  // An empty residual, or a faulty q, draws from p.
  const Word64 winner = from_residual && !bad_q ? from_residual : from_p;
  const int status = decision.status | (bad_q ? kBadDraftProb : 0);
  const int64_t token = d.one_hot ? d.best : id_of(winner);
  write_result(p, b, span, r, token, status);
}

}  // namespace

int64_t rejection_sample_workspace(const RejectionSampleParams& p) {
  Workspace w;
  return lay_out(p, &w);
}

void launch_rejection_sample(const RejectionSampleParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  Workspace ws;
  lay_out(p, &ws);
  const int64_t slots = p.batch * ws.rows;
  const int64_t stats_chunks = chunks_per_cta(slots, ws.chunks);
  const int64_t finish_chunks = chunks_per_cta(p.batch, ws.chunks);
  const auto stats_ctas = static_cast<unsigned>(slots * ceil_div(ws.chunks, stats_chunks));
  const auto finish_ctas = static_cast<unsigned>(p.batch * ceil_div(ws.chunks, finish_chunks));
  with_float_type(p.logits_type, [&](auto type) {
    using T = decltype(type);
    row_stats_kernel<T><<<stats_ctas, kStreamThreads, 0, stream>>>(p, ws, stats_chunks);
    check_launch("rejection_sample");
    row_filter_kernel<T><<<static_cast<unsigned>(slots), kFilterThreads, 0, stream>>>(p, ws);
    check_launch("rejection_sample");
    finish_kernel<T><<<finish_ctas, kStreamThreads, 0, stream>>>(p, ws, finish_chunks);
    check_launch("rejection_sample");
  });
}

}  // namespace mtp::cuda

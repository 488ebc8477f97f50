// One request after the other decides its rows in order and stops at the first rejection, so rows
// that cannot matter are not read. With at least as many requests as threads, threads share the
// requests; with fewer, they share the pieces of a row. Either way every sum is an integer sum and
// every other reduction a maximum, so the split changes nothing.
//
// A row is read in chunks of 1024 logits that stay in the first-level cache while their maximum,
// then the sum of their weights relative to it, is taken. Filters keep a prefix of the order
// (descending logit, ascending id): candidates above a cheap bound are collected as 64-bit keys of
// that order, and a radix descent over the keys finds the last one kept, by count (top_k) or by
// mass (top_p). Only the final row is read again, for the race.
#include "mtp/rejection_sample.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <type_traits>

#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"
#include "cpu/common/race.h"
#include "mtp/rejection_rules.h"

namespace mtp::cpu::MTP_ISA {
namespace {

using namespace rejection;

constexpr int64_t kGrain = 64;  // chunks, some 30 us; a thread is not worth waking for less
constexpr float kInf = std::numeric_limits<float>::infinity();

// ---- workspace -------------------------------------------------------------------------------

// Scratch of one worker. A piece is what one thread of the worker holds.
struct Scratch {
  float* chunk_max;    // [rows, chunks]; one row unless blocks come back to an earlier one
  float* lane_max;     // [chunks, 16], for top_k
  int64_t* chunk_sum;  // [chunks], fixed-point weights relative to chunk_max; -1: faulty
  uint64_t* items;     // [chunks * kChunk]; a piece's items start at its first chunk
  int64_t* counts;     // [pieces]
  int64_t* active;     // [pieces]
  int64_t* bins;       // [pieces, kBins]
};

struct Shape {
  int workers, pieces;
  int64_t chunks, rows;
  bool filters;

  explicit Shape(const RejectionSampleParams& p) {
    const int threads = max_threads();
    const bool share_requests = p.batch >= threads;
    workers = share_requests ? threads : 1;
    chunks = ceil_div(p.vocab, kChunk);
    const int64_t most = std::max<int64_t>(1, chunks / kGrain);
    pieces = share_requests ? 1 : static_cast<int>(std::min<int64_t>(threads, most));
    rows = p.block ? std::min(p.max_draft_len, p.num_drafts) + 1 : 1;
    filters = p.top_k || p.top_p || p.min_p;
  }

  int64_t worker_bytes() const {
    int64_t bytes = chunks * (rows * 4 + 8);
    if (filters) bytes += chunks * (kLanes * 4 + kChunk * 8) + pieces * (16 + kBins * 8);
    return ceil_div<int64_t>(bytes, 64) * 64;
  }

  Scratch scratch(void* workspace, int worker) const {
    char* at = static_cast<char*>(workspace) + worker * worker_bytes();
    Scratch s{};
    const auto take = [&](auto*& field, int64_t n) {
      field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(at);
      at += n * sizeof(*field);
    };
    take(s.chunk_sum, chunks);
    if (filters) {
      take(s.items, chunks * kChunk);
      take(s.counts, pieces);
      take(s.active, pieces);
      take(s.bins, pieces * kBins);
      take(s.lane_max, chunks * kLanes);
    }
    take(s.chunk_max, rows * chunks);
    return s;
  }
};

// ---- a target row ----------------------------------------------------------------------------

template <typename T>
struct Row : TargetRow<T> {
  using TargetRow<T>::TargetRow;
  using TargetRow<T>::logits;
  using TargetRow<T>::mask;
  using TargetRow<T>::vocab;

  float at(int64_t id) const { return this->allowed(id) ? to_float(logits[id]) : -kInf; }

  // The chunk's logits as f32, -inf where masked or past the vocabulary; `buffer` holds kChunk.
  const float* chunk(int64_t c, float* buffer) const {
    const T* from = logits + c * kChunk;
    const int64_t n = vocab - c * kChunk;
    if constexpr (std::is_same_v<T, float>) {
      if (!mask && n >= kChunk) return from;
    }
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      F32x16 x = broadcast(-kInf);
      if (i < n) {
        x = load_partial(from + i, n - i, -kInf);
        if (mask) {
          const int64_t id = c * kChunk + i;
          x = select(mask_from_bits(mask[id / 32] >> (id % 32) & 0xffff), x, broadcast(-kInf));
        }
      }
      store(buffer + i, x);
    }
    return buffer;
  }
};

// Which of the 16 logits from id on are kept.
Mask16 kept(const Distribution& d, F32x16 x, int64_t id) {
  const F32x16 cut = broadcast(d.cut);
  if (id + kLanes - 1 <= d.cut_id) return x >= cut;
  if (id > d.cut_id) return x > cut;
  const uint32_t ties = to_bits(x == cut) & to_bits(first_lanes(d.cut_id - id + 1));
  return mask_from_bits(to_bits(x > cut) | ties);
}

// ---- filters ---------------------------------------------------------------------------------

// The keys of the candidates of one row, in pieces.
struct Candidates {
  const Scratch& s;
  int64_t chunks;
  int pieces;
  Order order;
  float max, inv_temperature;

  int64_t first_chunk(int piece) const { return chunks * piece / pieces; }
  uint64_t* items(int piece) const { return s.items + first_chunk(piece) * kChunk; }

  template <typename Body>
  void each_piece(const Body& body) const {
    parallel_for(pieces, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t piece = begin; piece < end; ++piece) body(static_cast<int>(piece));
    });
  }

  // Everything from the logit `low` on.
  template <typename T>
  void collect(const Row<T>& row, const float* maxima, float low) const {
    each_piece([&](int piece) {
      float buffer[kChunk];
      uint64_t* out = items(piece);
      for (int64_t c = first_chunk(piece); c < first_chunk(piece + 1); ++c) {
        if (!(maxima[c] >= low)) continue;
        const float* x = row.chunk(c, buffer);
        for (int64_t i = 0; i < kChunk; i += kLanes) {
          for (uint32_t bits = to_bits(load(x + i) >= broadcast(low)); bits; bits &= bits - 1) {
            const int lane = __builtin_ctz(bits);
            *out++ = order.key(x[i + lane], c * kChunk + i + lane);
          }
        }
      }
      s.counts[piece] = out - items(piece);
    });
  }

  int64_t count() const {
    int64_t n = 0;
    for (int piece = 0; piece < pieces; ++piece) n += s.counts[piece];
    return n;
  }

  // body(key, fixed-point weight) for n keys.
  template <typename Body>
  void each_weight(const uint64_t* keys, int64_t n, const Body& body) const {
    for (int64_t i = 0; i < n; i += kLanes) {
      float lane[kLanes] = {};
      const int64_t width = std::min<int64_t>(kLanes, n - i);
      for (int64_t j = 0; j < width; ++j) lane[j] = order.logit(keys[i + j]);
      store(lane, weight(load(lane), broadcast(max), broadcast(inv_temperature)));
      for (int64_t j = 0; j < width; ++j) body(keys[i + j], to_fixed(lane[j]));
    }
  }

  int64_t mass_from(uint64_t lowest) const {
    std::atomic<int64_t> total{0};
    each_piece([&](int piece) {
      int64_t sum = 0;
      each_weight(items(piece), s.counts[piece],
                  [&](uint64_t key, int64_t mass) { sum += key >= lowest ? mass : 0; });
      total += sum;
    });
    return total;
  }

  // The largest key such that the candidates from it on number, or weigh, at least `target`; 0 if
  // all of them do not. Reorders the items.
  uint64_t descend(int64_t target, bool by_mass) const {
    for (int piece = 0; piece < pieces; ++piece) s.active[piece] = s.counts[piece];
    uint64_t prefix = 0;
    int64_t above = 0;
    for (int top = order.bits(); top > 0;) {
      const int digit = std::min(kDigitBits, top);
      const int shift = top - digit;
      const uint64_t digit_mask = (uint64_t{1} << digit) - 1;
      each_piece([&](int piece) {
        int64_t* bins = s.bins + piece * kBins;
        std::fill(bins, bins + kBins, 0);
        const uint64_t* keys = items(piece);
        const int64_t n = s.active[piece];
        if (by_mass) {
          each_weight(keys, n,
                      [&](uint64_t key, int64_t mass) { bins[key >> shift & digit_mask] += mass; });
        } else {
          for (int64_t i = 0; i < n; ++i) ++bins[keys[i] >> shift & digit_mask];
        }
      });
      int64_t bin = static_cast<int64_t>(digit_mask), size = 0;
      for (; bin >= 0; --bin) {
        size = 0;
        for (int piece = 0; piece < pieces; ++piece) size += s.bins[piece * kBins + bin];
        if (above + size >= target) break;
        above += size;
      }
      if (bin < 0) return 0;
      prefix = prefix << digit | static_cast<uint64_t>(bin);
      top = shift;
      if (!by_mass && above + size == target) return prefix << shift;
      // The keys that share the prefix move to the front of their piece.
      each_piece([&](int piece) {
        uint64_t* keys = items(piece);
        int64_t kept = 0;
        for (int64_t i = 0; i < s.active[piece]; ++i) {
          if (keys[i] >> shift == prefix) std::swap(keys[i], keys[kept++]);
        }
        s.active[piece] = kept;
      });
    }
    return prefix;
  }
};

// ---- one request -----------------------------------------------------------------------------

template <typename T>
struct Request {
  const RejectionSampleParams& p;
  const Shape& shape;
  const Scratch& s;
  const int64_t b;
  const Settings settings = settings_of(p, b);
  const Span span = span_of(p, b);

  Row<T> row(int r) const { return Row<T>(p, span, r); }
  int64_t draft(int r) const { return draft_token(p, span, r); }
  DraftRow draft_row(int r) const { return rejection::draft_row(p, span, r); }

  float* chunk_max(int r) const { return s.chunk_max + (p.block ? r : 0) * shape.chunks; }

  // One pass over the row: maxima and sums by chunk, and what follows from them.
  Distribution distribution(int r) const {
    const Row<T> x = row(r);
    float* const maxima = chunk_max(r);
    const bool need_lanes = settings.top_k > 0 && !settings.greedy;
    const F32x16 inverse = broadcast(settings.inv_temperature);
    parallel_for(shape.chunks, kGrain, [&](int64_t begin, int64_t end, int) {
      float buffer[kChunk];
      for (int64_t c = begin; c < end; ++c) {
        const float* logits = x.chunk(c, buffer);
        F32x16 top = broadcast(-kInf), bad = zero();
        for (int64_t i = 0; i < kChunk; i += kLanes) {
          const F32x16 v = load(logits + i);
          top = max(v, top);
          bad = select(v < broadcast(kInf), bad, broadcast(1.0f));
        }
        const float chunk_max = reduce_max(top);
        maxima[c] = chunk_max;
        s.chunk_sum[c] = 0;
        if (need_lanes) store(s.lane_max + c * kLanes, top);
        if (reduce_max(bad) > 0.0f) {
          s.chunk_sum[c] = -1;
        } else if (!settings.greedy && chunk_max > -kInf) {
          FixedSum sum;
          for (int64_t i = 0; i < kChunk; i += kLanes) {
            sum.add(weight(load(logits + i), broadcast(chunk_max), inverse));
          }
          s.chunk_sum[c] = sum.sum();
        }
      }
    });

    Distribution d = Distribution::whole(settings.inv_temperature);
    d.max = *std::max_element(maxima, maxima + shape.chunks);
    for (int64_t c = 0; c < shape.chunks; ++c) d.faulty |= s.chunk_sum[c] < 0;
    d.faulty |= d.max == -kInf;
    d.one_hot = d.faulty || settings.greedy;
    if (d.faulty) {
      float best = -kInf;
      for (int64_t v = 0; v < p.vocab; ++v) {
        const float logit = x.at(v);
        if (logit > best && logit < kInf) {
          best = logit;
          d.best = v;
        }
      }
    } else if (settings.greedy) {
      d.best = (std::find(maxima, maxima + shape.chunks, d.max) - maxima) * kChunk;
      while (x.at(d.best) != d.max) ++d.best;
    } else {
      for (int64_t c = 0; c < shape.chunks; ++c) {
        if (s.chunk_sum[c] == 0) continue;
        const float factor = weight(maxima[c], d.max, d.inv_temperature);
        d.sum += rescale_fixed(s.chunk_sum[c], factor);
      }
      if (settings.filtered()) filter(x, maxima, &d);
    }
    return d;
  }

  // No candidate below this can be kept.
  float lowest_candidate(const float* maxima, const Distribution& d) const {
    const float low = round_up(rejection::lowest_candidate(settings, d, p.vocab));
    if (settings.top_k == 0) return low;
    // The k-th largest of the maxima of disjoint groups is at most the k-th largest of all.
    const bool few = settings.top_k <= shape.chunks;
    const int64_t groups = few ? shape.chunks : shape.chunks * kLanes;
    if (settings.top_k > groups) return low;
    float* copy = reinterpret_cast<float*>(s.items);
    std::copy_n(few ? maxima : s.lane_max, groups, copy);
    std::nth_element(copy, copy + settings.top_k - 1, copy + groups, std::greater<float>());
    return std::max(low, copy[settings.top_k - 1]);
  }

  void filter(const Row<T>& x, const float* maxima, Distribution* d) const {
    const Candidates candidates{s,      shape.chunks,      shape.pieces, Order(p.vocab),
                                d->max, d->inv_temperature};
    const float low = lowest_candidate(maxima, *d);
    candidates.collect(x, maxima, low);
    uint64_t last = 0;  // the last key kept
    if (settings.top_k > 0 && candidates.count() > settings.top_k) {
      last = candidates.descend(settings.top_k, false);
    }
    if (settings.top_p < 1.0f) {
      const bool whole = settings.top_k == 0 && settings.min_p == 0.0f;
      const int64_t total = whole ? d->sum : candidates.mass_from(last);
      const int64_t target = top_p_target(settings.top_p, total);
      last = std::max(last, candidates.descend(target, true));
    }
    d->sum = candidates.mass_from(last);
    d->cut = last ? candidates.order.logit(last) : low;
    d->cut_id = last ? candidates.order.id(last) : INT64_MAX;
  }

  // ---- drafts ----

  double probability(int r, const Distribution& d, int64_t v) const {
    return d.probability(row(r).at(v), v);
  }

  bool has_bad_prob(const DraftRow& q) const {
    if (q.dense) {
      std::atomic<bool> found{false};
      parallel_for(shape.chunks, kGrain, [&](int64_t begin, int64_t end, int) {
        F32x16 bad = zero();
        const int64_t stop = std::min(end * kChunk, p.vocab);
        for (int64_t i = begin * kChunk; i < stop; i += kLanes) {
          const F32x16 v = load_partial(q.dense + i, stop - i);
          // One comparison for NaN, infinity and below 0: v - v is 0 only for what is finite.
          bad = select((v - v) + abs(v) <= v, bad, broadcast(1.0f));
        }
        if (reduce_max(bad) > 0.0f) found = true;
      });
      return found;
    }
    for (int64_t j = 0; j < q.count; ++j) {
      if (q.counts(j) && bad_prob(q.prob(j))) return true;
    }
    return false;
  }

  // max(scale * p - q, 0) of the logits of chunk c, scaled to the weights' unit by `a`.
  void residual_chunk(const DraftRow& q, float a, int64_t c, float* weights) const {
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      F32x16 draft = zero();
      if (q.dense) draft = load_partial(q.dense + c * kChunk + i, p.vocab - c * kChunk - i);
      store(weights + i, residual_weight(load(weights + i), broadcast(a), zero() - draft));
    }
  }

  void weights_chunk(const Row<T>& x, const Distribution& d, int64_t c, float* weights) const {
    const float* logits = x.chunk(c, weights);
    const F32x16 inverse = broadcast(d.inv_temperature), top = broadcast(d.max);
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      const F32x16 v = load(logits + i);
      const Mask16 in = kept(d, v, c * kChunk + i);
      store(weights + i, to_bits(in) ? select(in, weight(v, top, inverse), zero()) : zero());
    }
  }

  // The mass of max(scale * p - q, 0).
  double residual_mass(int r, const Distribution& d, const DraftRow& q, double scale) const {
    if (d.one_hot) return std::max(scale - static_cast<double>(q.at(d.best)), 0.0);
    const Row<T> x = row(r);
    const auto a = static_cast<float>(scale / d.mass());
    std::atomic<int64_t> total{0};
    if (q.dense) {
      parallel_for(shape.chunks, kGrain, [&](int64_t begin, int64_t end, int) {
        float weights[kChunk];
        FixedSum sum;
        for (int64_t c = begin; c < end; ++c) {
          weights_chunk(x, d, c, weights);
          residual_chunk(q, a, c, weights);
          for (int64_t i = 0; i < kChunk; i += kLanes) sum.add(load(weights + i));
        }
        total += sum.sum();
      });
      return static_cast<double>(total) / kFixedOne;
    }
    // All of p but what the listed ids take away.
    int64_t taken = 0;
    for (int64_t j = 0; j < q.count; ++j) {
      if (!q.counts(j)) continue;
      const float w = d.weight_of(x.at(q.id(j)), q.id(j));
      taken += to_fixed(mtp::min(w * a, q.prob(j)));
    }
    return std::max(scale - static_cast<double>(taken) / kFixedOne, 0.0);
  }

  // The winner among p's weights, or of max(scale * p - q, 0) if there is a q; -1 if none is
  // positive.
  int64_t race(int r, const Distribution& d, const DraftRow* q, double scale) const {
    const Row<T> x = row(r);
    const float* maxima = chunk_max(r);
    const auto a = static_cast<float>(scale / d.mass());
    const auto key = philox::make_key(p.seeds[b], p.positions[b], philox::kFinal, r);
    // The score's bits above the complement of the id: larger wins, then the lower id.
    std::atomic<uint64_t> winner{0};
    parallel_for(shape.chunks, kGrain, [&](int64_t begin, int64_t end, int) {
      float weights[kChunk];
      float best = 0.0f;
      int64_t best_id = -1;
      for (int64_t c = begin; c < end; ++c) {
        if (!(maxima[c] >= d.cut) || maxima[c] == -kInf) continue;
        weights_chunk(x, d, c, weights);
        if (q) {
          residual_chunk(*q, a, c, weights);
          for (int64_t j = 0; j < q->count; ++j) {
            const int64_t id = q->id(j);
            if (id / kChunk != c || !q->counts(j)) continue;
            weights[id % kChunk] = residual_weight(d.weight_of(x.at(id), id), a, -q->prob(j));
          }
        }
        for (int64_t i = 0; i < kChunk; i += 2 * kLanes) {
          const F32x16 w[2] = {load(weights + i), load(weights + i + kLanes)};
          if (!(to_bits(w[0] > zero()) | to_bits(w[1] > zero()))) continue;
          F32x16 u[2];
          race_uniforms(key, static_cast<uint32_t>((c * kChunk + i) / 4), u);
          for (int half = 0; half < 2; ++half) {
            // exponential(u) >= u, so the bound w / u settles almost every vector.
            if (!to_bits(w[half] > u[half] * broadcast(best * 0.9999f))) continue;
            const F32x16 score = w[half] / exponential(u[half]);
            float lane[kLanes];
            store(lane, score);
            for (uint32_t bits = to_bits(score > broadcast(best)); bits; bits &= bits - 1) {
              const int j = __builtin_ctz(bits);
              if (lane[j] > best) {
                best = lane[j];
                best_id = c * kChunk + i + half * kLanes + j;
              }
            }
          }
        }
      }
      if (best_id < 0) return;
      const uint64_t mine = static_cast<uint64_t>(float_to_bits(best)) << 32 |
                            (0xffffffffu - static_cast<uint32_t>(best_id));
      uint64_t seen = winner.load();
      while (seen < mine && !winner.compare_exchange_weak(seen, mine)) {
      }
    });
    const uint64_t won = winner.load();
    return won ? static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(won)) : -1;
  }

  int64_t final_token(int r, const Distribution& d, const DraftRow* q, double scale) const {
    if (d.one_hot) return d.best;
    const int64_t id = race(r, d, q, scale);
    return id >= 0 ? id : race(r, d, nullptr, 1.0);
  }

  // ---- the two methods ----

  void finish(int accepted, int64_t token, int32_t status) const {
    int32_t* out = p.token_ids + b * (p.max_draft_len + 1);
    for (int i = 0; i <= p.max_draft_len; ++i) {
      out[i] = static_cast<int32_t>(i < accepted ? draft(i) : i == accepted ? token : -1);
    }
    p.num_accepted[b] = accepted;
    p.status[b] = status;
  }

  void run_token() const {
    int32_t status = settings.status;
    for (int r = 0;; ++r) {
      const Distribution d = distribution(r);
      if (d.faulty) status |= kBadTarget;
      if (r == span.n) return finish(r, final_token(r, d, nullptr, 1.0), status);
      const int64_t token = draft(r);
      if (token < 0 || token >= p.vocab) {
        status |= kBadDraftId;
        return finish(r, final_token(r, d, nullptr, 1.0), status);
      }
      if (settings.greedy) {
        if (token == d.best) continue;
        return finish(r, d.best, status);
      }
      const DraftRow q = draft_row(r);
      const float q_token = q.at(token);
      const bool bad = bad_prob(q_token);
      if (!bad && accept_token(coin(p, b, r), q_token, probability(r, d, token))) continue;
      if (bad || has_bad_prob(q)) {
        status |= kBadDraftProb;
        return finish(r, final_token(r, d, nullptr, 1.0), status);
      }
      return finish(r, final_token(r, d, &q, 1.0), status);
    }
  }

  void run_block() const {
    int32_t status = settings.status;
    int n = 0;
    for (; n < span.n; ++n) {
      const bool bad_id = draft(n) < 0 || draft(n) >= p.vocab;
      if (!bad_id && !has_bad_prob(draft_row(n))) continue;
      status |= bad_id ? kBadDraftId : kBadDraftProb;
      break;
    }
    // The last accepted row is raced after rows behind it were looked at: keep what it needs.
    double product = 1.0, accepted_product = 1.0;
    int accepted = 0;
    Distribution d = distribution(0);
    Distribution final = d;
    if (d.faulty) status |= kBadTarget;
    for (int i = 1; i <= n; ++i) {
      const int64_t token = draft(i - 1);
      product = block_product(product, probability(i - 1, d, token), draft_row(i - 1).at(token));
      d = distribution(i);
      if (d.faulty) status |= kBadTarget;
      const double chance =
          i == n ? product : block_chance(product, residual_mass(i, d, draft_row(i), product));
      if (static_cast<double>(coin(p, b, i - 1)) < chance) {
        accepted = i;
        accepted_product = product;
        final = d;
      }
    }
    if (accepted == n) {
      return finish(accepted, final_token(accepted, final, nullptr, 1.0), status);
    }
    const DraftRow q = draft_row(accepted);
    finish(accepted, final_token(accepted, final, &q, accepted_product), status);
  }

  void run() const {
    if (p.block && !settings.greedy) {
      run_block();
    } else {
      run_token();
    }
  }
};

template <typename T>
void sample(const RejectionSampleParams& p) {
  const Shape shape(p);
  const auto one = [&](int64_t b, int worker) {
    const Scratch scratch = shape.scratch(p.workspace, worker);
    Request<T>{p, shape, scratch, b}.run();
  };
  if (shape.workers > 1) {
    parallel_for_dynamic(p.batch, one);
  } else {
    for (int64_t b = 0; b < p.batch; ++b) one(b, 0);
  }
}

}  // namespace

void launch_rejection_sample(const RejectionSampleParams& p) {
  switch (p.logits_type) {
    case DType::kF32:
      return sample<float>(p);
    case DType::kF16:
      return sample<F16>(p);
    case DType::kBF16:
      return sample<BF16>(p);
    default:
      throw std::invalid_argument("rejection_sample: unsupported logits dtype");
  }
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_rejection_sample, mtp::RejectionSampleParams)

#if MTP_ISA_LEVEL == 0
int64_t mtp::cpu::rejection_sample_workspace(const RejectionSampleParams& p) {
  const generic::Shape shape(p);
  return shape.workers * shape.worker_bytes();
}
#endif

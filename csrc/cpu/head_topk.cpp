// The weights stream past as in skinny_linear; a tile of logits lives in L1 just long enough to be
// looked at. For each activation row a thread keeps its k best (a vector compare with the k-th
// best rejects nearly every logit) and, per chunk of kChunk weight rows, maximum and sum of
// exponentials. Chunks start at absolute rows and are merged in order, so lse depends neither on
// the number of threads nor on M; the k best are a total order and do not depend on either anyway.
#include "mtp/head_topk.h"

#include <cmath>
#include <limits>

#include "cpu/common/isa.h"
#include "cpu/common/parallel.h"
#include "cpu/common/scratch.h"
#include "cpu/common/weight_stream.h"

namespace mtp::cpu::MTP_ISA {
namespace {

constexpr int64_t kChunk = 8 * kTileWidth;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool better(float a, float b) { return a > b || (b != b && a == a); }

// The k best of what was offered in ascending order of row.
struct Best {
  float value[kMaxTopK];
  int64_t row[kMaxTopK];
  int count;

  // A logit that is not above this is not among the best; NaN: cannot tell.
  float threshold(int k) const {
    return count < k ? std::numeric_limits<float>::quiet_NaN() : value[k - 1];
  }
  void offer(float v, int64_t r, int k) {
    if (count == k && !better(v, value[k - 1])) return;
    int i = count < k ? count++ : k - 1;
    for (; i > 0 && better(v, value[i - 1]); --i) {
      value[i] = value[i - 1];
      row[i] = row[i - 1];
    }
    value[i] = v;
    row[i] = r;
  }
};

// Sum of exp(x - base()) over what was added; base is the maximum unless that is not finite.
struct ExpSum {
  float max = -kInfinity;
  F32x16 sum = zero();

  static float base(float max) { return std::isfinite(max) ? max : 0.0f; }
  void raise(float to) {
    if (to <= max) return;
    sum = sum * broadcast(std::exp(max - base(to)));
    max = to;
  }
};

struct Partial {
  float max, sum;
};

template <typename W, typename X>
class HeadTopk {
 public:
  HeadTopk(const HeadTopkParams& p, const W* weight) : p_(p), weight_(weight) {}

  void run() {
    const int threads = max_threads();
    chunks_ = ceil_div(p_.v, kChunk);
    const int64_t rows = std::min<int64_t>(p_.m, kMaxRows);
    best_ = scratch<Best, 1>(threads * rows);
    partials_ = scratch<Partial, 2>(chunks_ * rows);
    for (first_row_ = 0; first_row_ < p_.m; first_row_ += kMaxRows) {
      rows_ = std::min<int64_t>(kMaxRows, p_.m - first_row_);
      for (int64_t i = 0; i < threads * rows_; ++i) best_[i].count = 0;
      parallel_for(p_.v, kChunk, [&](int64_t begin, int64_t end, int thread) {
        stream(begin, end, best_ + thread * rows_);
      });
      for (int64_t m = 0; m < rows_; ++m) merge(m, threads);
    }
  }

 private:
  void stream(int64_t begin, int64_t end, Best* best) const {
    const PackedRows<W, X> packed(rows_, p_.h, [&](int64_t row, float* out) {
      const auto* hidden = static_cast<const char*>(p_.hidden);
      const int64_t offset = (first_row_ + row) * p_.hidden_stride * dtype_bytes(p_.dtype);
      widen_row(p_.dtype, hidden + offset, p_.h, out);
      if (p_.norm_weight) {
        rms_norm_row(out, p_.h, p_.dtype, p_.norm_weight, p_.gemma_norm ? 1.0f : 0.0f, p_.eps);
      }
    });
    for (int64_t first = begin; first < end; first += kChunk) {
      ExpSum sums[kMaxRows];
      stream_weights(weight_, p_.weight_stride, first, std::min(end, first + kChunk), packed,
                     [&](int64_t row, int64_t count, float* tile) {
                       take_tile(row, count, tile, best, sums);
                     });
      Partial* out = partials_ + first / kChunk * rows_;
      for (int64_t m = 0; m < rows_; ++m) out[m] = {sums[m].max, reduce_add(sums[m].sum)};
    }
  }

  void take_tile(int64_t first, int64_t count, float* tile, Best* best, ExpSum* sums) const {
    for (int64_t m = 0; m < rows_; ++m) {
      float* logits = tile + m * kTileWidth;
      F32x16 highest = broadcast(-kInfinity);
      const F32x16 threshold = broadcast(best[m].threshold(p_.k));
      for (int64_t j = 0; j < count; j += kLanes) {
        const F32x16 x = finish(load(logits + j), first + j, count - j);
        store(logits + j, x);
        highest = max(highest, x);
        uint32_t candidates = ~to_bits(x <= threshold) & to_bits(first_lanes(count - j));
        for (; candidates; candidates &= candidates - 1) {
          const int lane = __builtin_ctz(candidates);
          best[m].offer(logits[j + lane], first + j + lane, p_.k);
        }
      }
      sums[m].raise(reduce_max(highest));
      const F32x16 base = broadcast(ExpSum::base(sums[m].max));
      F32x16 sum = sums[m].sum;
      for (int64_t j = 0; j < count; j += kLanes) sum = sum + exp(load(logits + j) - base);
      sums[m].sum = sum;
    }
  }

  // From dot products to logits; lanes past `left` become -inf.
  F32x16 finish(F32x16 x, int64_t row, int64_t left) const {
    if (p_.weight_scale) x = x * load_partial(p_.weight_scale + row, left);
    if (p_.bias) x = x + load_partial_as(p_.dtype, p_.bias, row, left);
    if (p_.softcap > 0.0f) x = broadcast(p_.softcap) * tanh(x / broadcast(p_.softcap));
    return left < kLanes ? select(first_lanes(left), x, broadcast(-kInfinity)) : x;
  }

  void merge(int64_t m, int threads) const {
    Best all = best_[m];
    for (int t = 1; t < threads; ++t) {
      const Best& other = best_[t * rows_ + m];
      for (int i = 0; i < other.count; ++i) all.offer(other.value[i], other.row[i], p_.k);
    }
    const int64_t out = (first_row_ + m) * p_.k;
    for (int i = 0; i < p_.k; ++i) {
      p_.logits[out + i] = all.value[i];
      p_.ids[out + i] = token_id(all.row[i]);
    }

    float max = -kInfinity;
    for (int64_t c = 0; c < chunks_; ++c) {
      const float x = partials_[c * rows_ + m].max;
      if (!(x <= max)) max = x;
    }
    const double base = ExpSum::base(max);
    double sum = 0.0;
    for (int64_t c = 0; c < chunks_; ++c) {
      const Partial& part = partials_[c * rows_ + m];
      if (part.sum != 0.0f) sum += part.sum * std::exp(ExpSum::base(part.max) - base);
    }
    p_.lse[first_row_ + m] = static_cast<float>(base + std::log(sum));
  }

  int64_t token_id(int64_t row) const {
    if (!p_.token_map) return row + p_.vocab_offset;
    return p_.map_dtype == DType::kI32 ? static_cast<const int32_t*>(p_.token_map)[row]
                                       : static_cast<const int64_t*>(p_.token_map)[row];
  }

  const HeadTopkParams& p_;
  const W* weight_;
  int64_t chunks_ = 0, first_row_ = 0, rows_ = 0;
  Best* best_ = nullptr;         // [thread][row]
  Partial* partials_ = nullptr;  // [chunk][row]
};

}  // namespace

void launch_head_topk(const HeadTopkParams& p) {
  with_weight_type(p.weight_dtype, p.weight, [&]<typename W>(const W* weight) {
    with_packed_type<W>(p.dtype, p.h, [&]<typename X>(X) { HeadTopk<W, X>(p, weight).run(); });
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_head_topk, mtp::HeadTopkParams)

// The chunk loop of the training losses. An operator brings a row function, which turns one row of
// finished logits into its loss and, in place, into the gradient; a row lies in the second-level
// cache while its few passes run, so beside the products they cost next to nothing.
//
// The products are f32 and PyTorch's: logits = x . w^T once per chunk, then grad_weight += g^T . x
// and grad_x = g . w where they are wanted. Weights of 16 bits are widened a block at a time.
//
// Where the processor multiplies bf16 pairs, bf16 logits are the LM head's (weight_stream.h), in
// f32. The gradient becomes bf16 where it lies, and its two products are bf16 ones, PyTorch's too:
// summed in f32 and rounded per chunk and block, then added up in f32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/common/dispatch.h"
#include "cpu/common/parallel.h"
#include "cpu/common/weight_stream.h"
#include "mtp/mtp_loss.h"

namespace mtp::cpu {
inline namespace MTP_ISA {

struct LossRow {
  int64_t index;   // depth * T + row
  int64_t target;  // position that it is compared with
  int64_t depth;
};
// Sums over the rows of a depth: the loss, and what else the operator counts.
struct RowResult {
  double loss, extra;
};

struct Softmax {
  float max;
  double lse;
};

// Where things lie in the workspace.
struct LossWorkspace {
  static constexpr int64_t kWideBytes = 4 << 20;
  static constexpr int64_t kChunkRows = 512;  // twice as many gain 5 to 10% for twice the memory

  LossRow* rows;       // [K * T]
  RowResult* results;  // [K * T]
  float* x;            // [chunk, H], later its gradient
  float* logits;       // [chunk, pitch]
  float* wide;         // [block, H], for weights of 16 bits; or bf16 gradients of [2 * block, H]
  BF16* narrow;        // [chunk, H], what x was, then products

  // With a teacher, for the distinct positions of a chunk.
  float* teacher_x;          // [chunk, H]
  float* teacher;            // [chunk, pitch]
  Softmax* teacher_softmax;  // [chunk]
  int64_t* position;         // [chunk]
  int64_t* slot;             // [chunk], of each row

  int64_t chunk, pitch, block, bytes;

  LossWorkspace(const MtpLossParams& p, bool teacher_logits) {
    // Rows of a power of two would fall into the same cache sets.
    pitch = round_up(p.v, kVector) + kVector;
    chunk = std::min(kChunkRows, loss_chunk_rows(p.k * p.t, pitch * 4 * (teacher_logits ? 2 : 1),
                                                 kLossChunkBytes, 16, 64));
    block =
        p.dtype == DType::kF32
            ? 0
            : std::min(p.v, std::max<int64_t>(kVector, kWideBytes / 4 / p.h / kVector * kVector));
    char* at = static_cast<char*>(p.workspace);
    const auto take = [&](int64_t count, int64_t size) {
      char* const start = at;
      at += round_up(count * size, 64);
      return start;
    };
    rows = reinterpret_cast<LossRow*>(take(p.k * p.t, sizeof(LossRow)));
    results = reinterpret_cast<RowResult*>(take(p.k * p.t, sizeof(RowResult)));
    x = reinterpret_cast<float*>(take(chunk * p.h, 4));
    logits = reinterpret_cast<float*>(take(chunk * pitch, 4));
    wide = reinterpret_cast<float*>(take(block * p.h, 4));
    narrow = reinterpret_cast<BF16*>(take(p.dtype == DType::kBF16 ? chunk * p.h : 0, 2));
    const int64_t slots = teacher_logits ? chunk : 0;
    teacher_x = reinterpret_cast<float*>(take(slots * p.h, 4));
    teacher = reinterpret_cast<float*>(take(slots * pitch, 4));
    teacher_softmax = reinterpret_cast<Softmax*>(take(slots, sizeof(Softmax)));
    position = reinterpret_cast<int64_t*>(take(slots, 8));
    slot = reinterpret_cast<int64_t*>(take(slots, 8));
    bytes = at - static_cast<char*>(p.workspace);
  }

 private:
  static constexpr int64_t kVector = 16;
};

// ---- passes over a row of logits -------------------------------------------------------------

// Sum of f(column) over [0, n): f32 lanes within a block, f64 between blocks. f sees every lane of
// the last vector: rows are padded with -inf.
template <typename F>
double sum_columns(int64_t n, const F& f) {
  constexpr int64_t kBlock = 64 * kLanes;
  double total = 0.0;
  for (int64_t first = 0; first < n; first += kBlock) {
    F32x16 sum = zero();
    for (int64_t j = first; j < std::min(n, first + kBlock); j += kLanes) sum = sum + f(j);
    total += reduce_add(sum);
  }
  return total;
}

// Bias and softcap in place, then the row's maximum and log-sum-exp.
inline Softmax finish_logits(const MtpLossParams& p, float* x) {
  F32x16 highest = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < p.v; j += kLanes) {
    F32x16 logit = load(x + j);
    if (p.bias) logit = logit + load_partial_as(p.dtype, p.bias, j, p.v - j);
    if (p.softcap > 0.0f) logit = broadcast(p.softcap) * tanh(logit / broadcast(p.softcap));
    if (p.v - j < kLanes) {
      logit =
          select(first_lanes(p.v - j), logit, broadcast(-std::numeric_limits<float>::infinity()));
    }
    store(x + j, logit);
    highest = max(highest, logit);
  }
  const float top = reduce_max(highest);
  const F32x16 base = broadcast(top);
  const double sum = sum_columns(p.v, [&](int64_t j) { return exp(load(x + j) - base); });
  return {top, top + std::log(sum)};
}

// The derivative of the softcap at a finished logit.
inline F32x16 softcap_slope(float cap, F32x16 x) {
  const F32x16 t = x / broadcast(cap);
  return broadcast(1.0f) - t * t;
}

// x becomes g(column, logits) times the slope of the softcap.
template <typename G>
void write_gradient(const MtpLossParams& p, float* x, const G& g) {
  for (int64_t j = 0; j < p.v; j += kLanes) {
    const F32x16 logit = load(x + j);
    F32x16 y = g(j, logit);
    if (p.softcap > 0.0f) y = y * softcap_slope(p.softcap, logit);
    store(x + j, y);
  }
}

// The gradient of one column, given its logit, for columns that get their own value.
inline float column_gradient(const MtpLossParams& p, float logit, float g) {
  const float t = p.softcap > 0.0f ? logit / p.softcap : 0.0f;
  return g * (1.0f - t * t);
}

// ---- the loop --------------------------------------------------------------------------------

// Loss has
//   bool counts(int64_t position): whether the position has a target;
//   const void* teacher(int64_t position): its hidden state, or null for a loss without teacher;
//   RowResult row(float* x, int64_t position, const Softmax& s, const float* teacher,
//                 const Softmax& t, bool gradient, float scale): if a gradient is wanted, x becomes
//                 `scale` times that of the row's loss;
//   void finish(int64_t depth, double extra, int64_t tokens).
template <typename Loss>
class MtpLossLoop {
 public:
  MtpLossLoop(const MtpLossParams& p, const Loss& loss, bool teacher_logits)
      : p_(p), loss_(loss), w_(p, teacher_logits), teacher_logits_(teacher_logits) {}

  void run() {
    list_rows();
    const bool gradient = p_.wants_gradient();
    if (p_.grad_hidden) fill_zero(p_.grad_hidden, p_.k * p_.t * p_.h);
    if (p_.grad_weight && count_ == 0) fill_zero(p_.grad_weight, p_.v * p_.h);
    if (p_.grad_bias) fill_zero(p_.grad_bias, p_.v);
    for (int64_t first = 0; first < count_; first += w_.chunk) {
      const int64_t n = std::min(w_.chunk, count_ - first);
      const LossRow* rows = w_.rows + first;
      gather(n, w_.x, [&](int64_t i) { return hidden_row(rows[i]); });
      multiply_logits(n, w_.x, w_.logits);
      if (teacher_logits_) teacher_chunk(rows, n);
      parallel_for(n, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) take_row(rows[i], first + i, i, gradient);
      });
      if (gradient) multiply_gradients(rows, n, first > 0);
    }
    sum_up();
  }

 private:
  // By target position, then depth.
  void list_rows() {
    count_ = 0;
    std::fill(p_.num_tokens, p_.num_tokens + p_.k, int64_t{0});
    int64_t begin = p_.cu_seqlens ? clamp_offset(p_.cu_seqlens[0], 0, p_.t) : 0;
    for (int64_t document = 0; document < p_.documents; ++document) {
      const int64_t end =
          p_.cu_seqlens ? clamp_offset(p_.cu_seqlens[document + 1], begin, p_.t) : p_.t;
      for (int64_t target = begin + p_.shift; target < end; ++target) {
        if ((p_.loss_mask && !p_.loss_mask[target]) || !loss_.counts(target)) continue;
        for (int64_t d = 0; d < p_.k && target - p_.shift - d >= begin; ++d) {
          w_.rows[count_++] = {d * p_.t + target - p_.shift - d, target, d};
          ++p_.num_tokens[d];
        }
      }
      begin = end;
    }
    for (int64_t d = 0; d < p_.k; ++d) {
      weight_[d] = p_.depth_weights ? p_.depth_weights[d] : 1.0f / static_cast<float>(p_.k);
      const int64_t tokens = p_.num_tokens[d];
      scale_[d] = weight_[d] / static_cast<float>(std::max<int64_t>(tokens, 1));
    }
  }

  const void* hidden_row(const LossRow& row) const {
    const int64_t offset =
        row.depth * p_.depth_stride + (row.index - row.depth * p_.t) * p_.row_stride;
    return static_cast<const char*>(p_.hidden) + offset * dtype_bytes(p_.dtype);
  }

  template <typename Row>
  void gather(int64_t n, float* out, const Row& row) const {
    parallel_for(n, 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) widen(row(i), p_.h, out + i * p_.h);
    });
  }

  void widen(const void* in, int64_t n, float* out) const {
    with_float_type(p_.dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(in);
      for (int64_t j = 0; j < n; j += kLanes) {
        store_partial(out + j, load_partial(from + j, n - j), n - j);
      }
    });
  }

  static void fill_zero(float* out, int64_t n) {
    parallel_for(n, 4096, [&](int64_t begin, int64_t end, int) {
      std::memset(out + begin, 0, (end - begin) * 4);
    });
  }

  // Calls body(first, count, f32 weight rows, stride) for blocks that cover the vocabulary.
  template <typename Body>
  void weight_blocks(const Body& body) const {
    const auto* weight = static_cast<const char*>(p_.weight);
    if (p_.dtype == DType::kF32) {
      return body(int64_t{0}, p_.v, static_cast<const float*>(p_.weight), p_.weight_stride);
    }
    for (int64_t first = 0; first < p_.v; first += w_.block) {
      const int64_t count = std::min(w_.block, p_.v - first);
      gather(count, w_.wide, [&](int64_t i) {
        return weight + (first + i) * p_.weight_stride * dtype_bytes(p_.dtype);
      });
      body(first, count, const_cast<const float*>(w_.wide), p_.h);
    }
  }

  bool multiplies_pairs() const { return MTP_ISA_LEVEL >= 3 && p_.dtype == DType::kBF16; }

  void multiply_logits(int64_t n, const float* x, float* logits) const {
    if (multiplies_pairs()) return stream_logits(n, x, logits);
    weight_blocks([&](int64_t first, int64_t count, const float* weight, int64_t stride) {
      p_.gemm(false, true, n, count, p_.h, x, p_.h, weight, stride, false, logits + first,
              w_.pitch);
    });
  }

  // As head_topk computes them; x is bf16, widened. Packed rows for one pass over the weights take
  // part of the second-level cache.
  static constexpr int64_t kLogitRows = 256;
  void stream_logits(int64_t n, const float* x, float* logits) const {
    const auto* weight = static_cast<const BF16*>(p_.weight);
    parallel_for(p_.v, kTileWidth, [&](int64_t begin, int64_t end, int) {
      with_packed_type<BF16>(p_.dtype, p_.h, [&]<typename X>(X) {
        for (int64_t first = 0; first < n; first += kLogitRows) {
          const PackedRows<BF16, X> packed(std::min<int64_t>(kLogitRows, n - first), p_.h,
                                           [&](int64_t row, float* out) {
                                             std::memcpy(out, x + (first + row) * p_.h, p_.h * 4);
                                           });
          stream_weights(weight, p_.weight_stride, begin, end, packed,
                         [&](int64_t column, int64_t count, const float* tile) {
                           float* out = logits + first * w_.pitch + column;
                           for (int64_t m = 0; m < packed.rows(); ++m, out += w_.pitch) {
                             std::memcpy(out, tile + m * kTileWidth, count * 4);
                           }
                         });
        }
      });
    });
  }

  // The teacher's logits of the chunk's distinct positions, which stand side by side.
  void teacher_chunk(const LossRow* rows, int64_t n) {
    int64_t slots = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (i == 0 || rows[i].target != rows[i - 1].target) w_.position[slots++] = rows[i].target;
      w_.slot[i] = slots - 1;
    }
    gather(slots, w_.teacher_x, [&](int64_t i) { return loss_.teacher(w_.position[i]); });
    multiply_logits(slots, w_.teacher_x, w_.teacher);
    parallel_for(slots, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        w_.teacher_softmax[i] = finish_logits(p_, w_.teacher + i * w_.pitch);
      }
    });
  }

  void take_row(const LossRow& row, int64_t number, int64_t i, bool gradient) const {
    float* const x = w_.logits + i * w_.pitch;
    const Softmax s = finish_logits(p_, x);
    const int64_t slot = teacher_logits_ ? w_.slot[i] : 0;
    w_.results[number] = loss_.row(
        x, row.target, s, teacher_logits_ ? w_.teacher + slot * w_.pitch : nullptr,
        teacher_logits_ ? w_.teacher_softmax[slot] : Softmax{}, gradient, scale_[row.depth]);
    if (gradient && multiplies_pairs()) narrow_gradient(x, pairs_row(i));
  }

  // In place. Zeros follow: oneDNN's products by tile registers multiply what follows a row, up to
  // the next multiple of 32, by zero, which makes NaN of NaN.
  void narrow_gradient(const float* x, BF16* out) const {
    const int64_t end = round_up(p_.v, 2 * kLanes);
    for (int64_t j = 0; j < end; j += kLanes) {
      store(out + j, select(first_lanes(p_.v - j), load(x + j), zero()));
    }
  }

  // A row of the gradient as bf16.
  BF16* pairs_row(int64_t i) const { return reinterpret_cast<BF16*>(w_.logits + i * w_.pitch); }

  void multiply_gradients(const LossRow* rows, int64_t n, bool accumulate) const {
    const float* const g = w_.logits;
    if (p_.grad_bias) {
      parallel_for(p_.v, 1024, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = 0; i < n; ++i) {
          const auto add = [&](const auto* row) {
            accumulate_row(row + begin, true, end - begin, p_.grad_bias + begin);
          };
          if (multiplies_pairs()) {
            add(pairs_row(i));
          } else {
            add(g + i * w_.pitch);
          }
        }
      });
    }
    if (p_.grad_weight) {
      if (multiplies_pairs()) {
        multiply_weight_pairs(n, accumulate);
      } else {
        p_.gemm(true, false, p_.v, p_.h, n, g, w_.pitch, w_.x, p_.h, accumulate, p_.grad_weight,
                p_.h);
      }
    }
    if (!p_.grad_hidden) return;
    if (multiplies_pairs()) {
      multiply_hidden_pairs(n);
    } else {
      weight_blocks([&](int64_t first, int64_t count, const float* weight, int64_t stride) {
        p_.gemm(false, false, n, p_.h, count, g + first, w_.pitch, weight, stride, first > 0, w_.x,
                p_.h);
      });
    }
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(p_.grad_hidden + rows[i].index * p_.h, w_.x + i * p_.h, p_.h * 4);
    }
  }

  // out = part, or out + part.
  template <typename T>
  static void accumulate_row(const T* part, bool accumulate, int64_t n, float* out) {
    for (int64_t j = 0; j < n; j += kLanes) {
      const F32x16 x = load_partial(part + j, n - j);
      store_partial(out + j, accumulate ? load_partial(out + j, n - j) + x : x, n - j);
    }
  }
  static void add_up(const BF16* part, bool accumulate, int64_t n, float* out) {
    parallel_for(n, 4096, [&](int64_t begin, int64_t end, int) {
      accumulate_row(part + begin, accumulate, end - begin, out + begin);
    });
  }

  // Calls body(first, count) for blocks whose products fit `wide` as bf16.
  template <typename Body>
  void pair_blocks(const Body& body) const {
    for (int64_t first = 0; first < p_.v; first += 2 * w_.block) {
      body(first, std::min(2 * w_.block, p_.v - first));
    }
  }

  // grad_weight += g^T . x
  void multiply_weight_pairs(int64_t n, bool accumulate) const {
    parallel_for(n * p_.h, 4096, [&](int64_t begin, int64_t end, int) {
      for (int64_t j = begin; j < end; j += kLanes) {
        store_partial(w_.narrow + j, load_partial(w_.x + j, end - j), end - j);
      }
    });
    BF16* const product = reinterpret_cast<BF16*>(w_.wide);
    pair_blocks([&](int64_t first, int64_t count) {
      p_.gemm_bf16(true, count, p_.h, n, pairs_row(0) + first, 2 * w_.pitch, w_.narrow, p_.h,
                   product, p_.h);
      add_up(product, accumulate, count * p_.h, p_.grad_weight + first * p_.h);
    });
  }

  // x = g . w
  void multiply_hidden_pairs(int64_t n) const {
    const auto* weight = static_cast<const BF16*>(p_.weight);
    pair_blocks([&](int64_t first, int64_t count) {
      p_.gemm_bf16(false, n, p_.h, count, pairs_row(0) + first, 2 * w_.pitch,
                   weight + first * p_.weight_stride, p_.weight_stride, w_.narrow, p_.h);
      add_up(w_.narrow, first > 0, n * p_.h, w_.x);
    });
  }

  void sum_up() {
    RowResult sums[kMaxDepths] = {};
    for (int64_t i = 0; i < count_; ++i) {
      RowResult& sum = sums[w_.rows[i].depth];
      sum.loss += w_.results[i].loss;
      sum.extra += w_.results[i].extra;
    }
    double total = 0.0;
    for (int64_t d = 0; d < p_.k; ++d) {
      const int64_t tokens = p_.num_tokens[d];
      const double mean = tokens ? sums[d].loss / static_cast<double>(tokens) : 0.0;
      p_.depth_loss[d] = static_cast<float>(mean);
      total += weight_[d] * mean;
      loss_.finish(d, sums[d].extra, tokens);
    }
    *p_.loss = static_cast<float>(total);
  }

  const MtpLossParams& p_;
  const Loss& loss_;
  const LossWorkspace w_;
  const bool teacher_logits_;
  int64_t count_ = 0;
  float weight_[kMaxDepths], scale_[kMaxDepths];
};

}  // namespace MTP_ISA
}  // namespace mtp::cpu

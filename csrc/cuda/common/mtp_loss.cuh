// The chunk loop of the training losses on CUDA.
//
// 1. One CTA lists the rows that count, by target position, then depth. A position's depths are
//    those below some n, so two scans place every row; the list's length stays on the device. All
//    later grids are sized for the longest list and CTAs behind its end return at once.
// 2. Per chunk of rows: gather their hiddens; logits = x w^T (gemm.cuh) in f32; one CTA per row
//    takes maximum, sum and argmax in one pass and writes the loss and, in a second pass, the
//    gradient in the operands' dtype; grad_weight += g^T x in f32; grad_x = g w, split along the
//    vocabulary so that few rows fill the device, the parts added in order and scattered.
// 3. One CTA sums up the depths.
//
// What moves per chunk of R rows, in elements: the weight twice, grad_weight read and written once,
// R x V logits (f32) once out and twice in, R x V gradients once out and twice in. R is as large as
// the workspace allows, since everything but the logits is paid per chunk.
//
// f16 gradients of logits are stored in units of the largest row scale / 256, where the small
// probabilities of a large vocabulary survive; the products' results are multiplied by the unit.
//
// No atomics on floats and fixed orders of summation: equal inputs give equal bits. Registers, no
// spills: products at most 216 (f32) and 128 (16 bits), everything else at most 64.
#pragma once

#include <algorithm>
#include <climits>

#include "cuda/common/gemm.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "mtp/mtp_loss.h"

namespace mtp::cuda {

constexpr int kLossThreads = 256;
constexpr int kListThreads = 1024;

struct LossRow {
  int64_t index;   // depth * T + row
  int64_t target;  // position that it is compared with
  int depth;
  int rank;  // of the position among those that have rows
};

struct RowList {
  int count;
  float unit;                // of the stored gradients
  float weight[kMaxDepths];  // of a depth in the loss
  float scale[kMaxDepths];   // of a row of it, in units
};

struct RowChunk {
  const RowList* list;
  const LossRow* rows;  // the whole list
  int first, capacity;

  __device__ __forceinline__ int count() const {
    return max(0, min(capacity, list->count - first));
  }
  // The distinct positions among the chunk's rows.
  __device__ __forceinline__ int slots() const {
    const int n = count();
    return n > 0 ? rows[first + n - 1].rank - rows[first].rank + 1 : 0;
  }
  __device__ __forceinline__ const LossRow& row(int i) const { return rows[first + i]; }
  __device__ __forceinline__ int slot(int i) const { return row(i).rank - rows[first].rank; }
};

// ---- the list --------------------------------------------------------------------------------

// Inclusive scan over the block's threads; `total` is that of the last one. `scratch` holds one
// value per warp.
template <int kThreads, typename T, typename Combine>
__device__ __forceinline__ T block_scan(T value, T* scratch, const Combine& combine, T* total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T below = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value = combine(below, value);
  }
  if (lane == kWarp - 1) scratch[warp] = value;
  __syncthreads();
  T before = scratch[0], all = scratch[0];
  for (int w = 1; w < kThreads / kWarp; ++w) {
    if (w < warp) before = combine(before, scratch[w]);
    all = combine(all, scratch[w]);
  }
  __syncthreads();
  *total = all;
  return warp > 0 ? combine(before, value) : value;
}

struct ListParams {
  const int32_t* cu_seqlens;   // [documents + 1] or null
  const bool* loss_mask;       // [T] or null
  const float* depth_weights;  // [K] or null
  int64_t* num_tokens;         // [K]
  int64_t* bounds;             // [documents + 1]
  RowList* list;
  LossRow* rows;  // [K * T]
  int64_t k, t, documents, shift;
  bool scaled;  // gradients are stored in f16
};

template <typename Loss>
__global__ void __launch_bounds__(kListThreads)
    list_rows_kernel(const ListParams p, const Loss loss) {
  __shared__ unsigned long long scratch[kListThreads / kWarp];
  __shared__ int tokens[kMaxDepths];
  const int thread = threadIdx.x;
  if (thread < kMaxDepths) tokens[thread] = 0;

  // Offsets that decrease or leave [0, T] are clamped.
  unsigned long long last = 0, total;
  for (int64_t base = 0; base <= p.documents; base += kListThreads) {
    const int64_t n = base + thread;
    int64_t offset = n > 0 ? p.t : 0;
    if (p.cu_seqlens && n <= p.documents) {
      offset = max(int64_t{0}, min(p.t, static_cast<int64_t>(p.cu_seqlens[n])));
    }
    const auto larger = [](unsigned long long a, unsigned long long b) { return a > b ? a : b; };
    const unsigned long long bound = larger(
        last,
        block_scan<kListThreads>(n <= p.documents ? static_cast<unsigned long long>(offset) : 0ull,
                                 scratch, larger, &total));
    if (n <= p.documents) p.bounds[n] = static_cast<int64_t>(bound);
    last = larger(last, total);
  }
  __syncthreads();

  unsigned long long placed = 0;  // rows, and above bit 32 positions
  for (int64_t base = 0; base < p.t; base += kListThreads) {
    const int64_t target = base + thread;
    int depths = 0;
    if (target < p.t && target >= p.bounds[0] && (!p.loss_mask || p.loss_mask[target]) &&
        loss.counts(target)) {
      int64_t document = 0, end = p.documents;  // the last one that starts at or before target
      while (end - document > 1) {
        const int64_t middle = (document + end) / 2;
        (p.bounds[middle] <= target ? document : end) = middle;
      }
      if (p.documents > 0 && target < p.bounds[document + 1]) {
        const int64_t n = target - p.shift - p.bounds[document] + 1;
        depths = static_cast<int>(max(int64_t{0}, min(p.k, n)));
      }
    }
    const unsigned long long mine =
        static_cast<unsigned long long>(depths) | (depths > 0 ? 1ull << 32 : 0);
    const unsigned long long here =
        placed - mine +
        block_scan<kListThreads>(
            mine, scratch, [](unsigned long long a, unsigned long long b) { return a + b; },
            &total);
    placed += total;
    for (int d = 0; d < depths; ++d) {
      p.rows[static_cast<uint32_t>(here) + d] = {d * p.t + target - p.shift - d, target, d,
                                                 static_cast<int>(here >> 32)};
      atomicAdd(&tokens[d], 1);
    }
  }
  __syncthreads();
  if (thread != 0) return;
  float largest = 0.0f;
  for (int d = 0; d < p.k; ++d) {
    p.num_tokens[d] = tokens[d];
    const float weight = p.depth_weights ? p.depth_weights[d] : 1.0f / static_cast<float>(p.k);
    p.list->weight[d] = weight;
    p.list->scale[d] = weight / static_cast<float>(max(tokens[d], 1));
    largest = fmaxf(largest, fabsf(p.list->scale[d]));
  }
  const float unit = p.scaled && largest > 0.0f ? largest / 256.0f : 1.0f;
  for (int d = 0; d < p.k; ++d) p.list->scale[d] /= unit;
  p.list->unit = unit;
  p.list->count = static_cast<int>(static_cast<uint32_t>(placed));
}

// ---- products --------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void copy_row(T* to, const T* from, int64_t n) {
  constexpr int kSize = Pack<T>::kSize;
  if (aligned_16(from)) {
    for (int64_t j = threadIdx.x * kSize; j < n; j += kLossThreads * kSize) {
      store_pack(to + j, load_pack(from + j));
    }
  } else {
    for (int64_t j = threadIdx.x; j < n; j += kLossThreads) to[j] = from[j];
  }
}

// The chunk's hiddens side by side; with a teacher, its distinct rows too. The second bound leaves
// sm_80's compiler the registers that it would spill.
template <typename T>
__global__ void __launch_bounds__(kLossThreads, 4)
    gather_rows_kernel(const RowChunk chunk, const T* hidden, int64_t depth_stride,
                       int64_t row_stride, int64_t t, int64_t h, T* x, const T* teacher,
                       int64_t teacher_stride, T* teacher_x) {
  const int i = blockIdx.x;
  if (i >= chunk.count()) return;
  const LossRow row = chunk.row(i);
  const int64_t position = row.index - row.depth * t;
  copy_row(x + i * h, hidden + row.depth * depth_stride + position * row_stride, h);
  if (teacher && (i == 0 || row.rank != chunk.row(i - 1).rank)) {
    copy_row(teacher_x + chunk.slot(i) * h, teacher + row.target * teacher_stride, h);
  }
}

enum class Extent { kRows, kSlots, kDepth };  // of a product: m, or k, is what the chunk holds

// c = a b^T on a grid of (m tiles, n tiles, parts of k).
template <typename T, Order kOrderA, Order kOrderB, Extent kExtent, typename Epilogue>
__global__ void __launch_bounds__(256, sizeof(T) == 4 ? 1 : 2)
    product_kernel(const RowChunk chunk, Matrix<T> a, const Matrix<T> b, int64_t k,
                   int64_t k_per_part, const Epilogue epilogue) {
  using G = Gemm<T, kOrderA, T, kOrderB>;
  extern __shared__ __align__(1024) unsigned char smem[];
  const int held = kExtent == Extent::kSlots ? chunk.slots() : chunk.count();
  if (kExtent == Extent::kDepth) {
    if (held == 0 && chunk.first > 0) return;
    k = held;
  } else {
    a.extent = held;
  }
  const int64_t m = static_cast<int64_t>(blockIdx.x) * G::kTile;
  const int64_t n = static_cast<int64_t>(blockIdx.y) * G::kTile;
  if (m >= a.extent) return;
  typename G::Accumulator acc = {};
  const int64_t k_begin = blockIdx.z * k_per_part;
  G::multiply(a, m, b, n, k_begin, min(k, k_begin + k_per_part), smem, acc);
  G::each_pair(acc, [&](int row, int column, float x, float next) {
    // Extents along n are even, or padded.
    if (m + row < a.extent && n + column < b.extent) epilogue(m + row, n + column, x, next);
  });
}

struct StoreRows {
  float* out;
  int64_t pitch, part_stride;
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, float x, float next) const {
    float* const to = out + blockIdx.z * part_stride + m * pitch + n;
    *reinterpret_cast<float2*>(to) = make_float2(x, next);
  }
};

struct AddInUnits {
  float* out;
  int64_t pitch;
  const RowList* list;
  bool accumulate;
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, float x, float next) const {
    float2* const to = reinterpret_cast<float2*>(out + m * pitch + n);
    const float unit = list->unit;
    float2 sum = accumulate ? *to : make_float2(0.0f, 0.0f);
    sum.x = fmaf(x, unit, sum.x);
    sum.y = fmaf(next, unit, sum.y);
    *to = sum;
  }
};

template <typename T, Order kOrderA, Order kOrderB, Extent kExtent, typename Epilogue>
void launch_product(const RowChunk& chunk, const Matrix<T>& a, const Matrix<T>& b, int64_t k,
                    int parts, int64_t k_per_part, const Epilogue& epilogue, cudaStream_t stream,
                    const char* op) {
  using G = Gemm<T, kOrderA, T, kOrderB>;
  const auto kernel = product_kernel<T, kOrderA, kOrderB, kExtent, Epilogue>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, G::kSmemBytes),
        op);
  const dim3 grid(ceil_div<int64_t>(a.extent, G::kTile), ceil_div<int64_t>(b.extent, G::kTile),
                  parts);
  kernel<<<grid, G::kThreads, G::kSmemBytes, stream>>>(chunk, a, b, k, k_per_part, epilogue);
  check_launch(op);
}

// Adds the parts in order and puts the chunk's rows where they belong.
static __global__ void __launch_bounds__(kLossThreads)
    scatter_rows_kernel(const RowChunk chunk, const float* parts, int part_count,
                        int64_t part_stride, int64_t h, float* grad_hidden) {
  const int i = blockIdx.x;
  if (i >= chunk.count()) return;
  const float unit = chunk.list->unit;
  float* const out = grad_hidden + chunk.row(i).index * h;
  for (int64_t j = threadIdx.x; j < h; j += kLossThreads) {
    float sum = 0.0f;
    for (int part = 0; part < part_count; ++part) sum += parts[part * part_stride + i * h + j];
    out[j] = sum * unit;
  }
}

template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    add_columns_kernel(const RowChunk chunk, const T* g, int64_t pitch, int64_t v, bool accumulate,
                       float* grad_bias) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kLossThreads + threadIdx.x;
  if (j >= v) return;
  const int rows = chunk.count();
  float sum = 0.0f;
  for (int i = 0; i < rows; ++i) sum += to_float(g[i * pitch + j]);
  grad_bias[j] = fmaf(sum, chunk.list->unit, accumulate ? grad_bias[j] : 0.0f);
}

// ---- rows of logits --------------------------------------------------------------------------

struct Softmax {
  float max, log_sum;  // lse = max + log_sum
  float sum;           // of the logits
  int argmax;

  __device__ __forceinline__ float lse() const { return max + log_sum; }
};

// A row and what is written of it. The logits are finished (bias, softcap) in place.
template <typename T>
struct LogitRow {
  float* x;     // [V]
  T* gradient;  // [V], or null; may be x
  const void* bias;
  int64_t v;
  float softcap;
  float* scratch;  // [2 * warps] in shared memory

  // body(j, x[j]) for this thread's columns, four neighbours at a time, ascending.
  template <typename Body>
  __device__ __forceinline__ void each(const Body& body) const {
    for (int64_t j = threadIdx.x * 4; j < v; j += kLossThreads * 4) {
      const float4 four = *reinterpret_cast<const float4*>(x + j);
      const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (j + e < v) body(j + e, values[e]);
      }
    }
  }

  // The sum over threads; a barrier before and behind it.
  __device__ __forceinline__ float sum(float value) const {
    return block_reduce<kLossThreads>(value, scratch, [](float a, float b) { return a + b; });
  }

  __device__ __forceinline__ Softmax softmax() const {
    float highest = -INFINITY, base = 0.0f, exps = 0.0f, total = 0.0f;
    int at = INT_MAX;
    for (int64_t j = threadIdx.x * 4; j < v; j += kLossThreads * 4) {
      float4 four = *reinterpret_cast<const float4*>(x + j);
      float* const values = &four.x;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (j + e >= v) continue;
        if (bias) values[e] += to_float(static_cast<const T*>(bias)[j + e]);
        if (softcap > 0.0f) values[e] = softcap * tanhf(values[e] / softcap);
        total += values[e];
        if (values[e] > highest) {
          highest = values[e];
          at = static_cast<int>(j) + e;
        }
      }
      if (bias || softcap > 0.0f) *reinterpret_cast<float4*>(x + j) = four;
      const float next = fabsf(highest) < INFINITY ? highest : 0.0f;
      if (exps != 0.0f) exps *= expf(base - next);
      base = next;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (j + e < v) exps += expf(values[e] - base);
      }
    }
    Softmax s;
    s.max =
        block_reduce<kLossThreads>(highest, scratch, [](float a, float b) { return fmaxf(a, b); });
    const float all = fabsf(s.max) < INFINITY ? s.max : 0.0f;
    // A thread that met nothing finite holds base 0 and adds what it has as it is.
    s.log_sum = logf(sum(exps == 0.0f ? 0.0f : exps * expf(base - all)));
    s.sum = sum(total);
    s.argmax =
        block_reduce<kLossThreads>(highest == s.max ? at : INT_MAX, reinterpret_cast<int*>(scratch),
                                   [](int a, int b) { return min(a, b); });
    return s;
  }

  __device__ __forceinline__ float slope(float logit) const {
    if (!(softcap > 0.0f)) return 1.0f;
    const float t = logit / softcap;
    return 1.0f - t * t;
  }

  // gradient[j] = g(j, x[j]) times the slope of the softcap.
  template <typename Function>
  __device__ __forceinline__ void write(const Function& g) const {
    struct alignas(4 * sizeof(T)) Four {
      T values[4];
    };
    for (int64_t j = threadIdx.x * 4; j < v; j += kLossThreads * 4) {
      const float4 four = *reinterpret_cast<const float4*>(x + j);
      const float values[4] = {four.x, four.y, four.z, four.w};
      Four out;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        out.values[e] = from_float<T>(j + e < v ? g(j + e, values[e]) * slope(values[e]) : 0.0f);
      }
      *reinterpret_cast<Four*>(gradient + j) = out;
    }
  }
};

struct RowResult {
  float loss, extra;
};

struct RowsParams {
  RowChunk chunk;
  float* logits;                   // [capacity, pitch]
  void* gradients;                 // [capacity, pitch], or null
  const void* bias;                // [V] or null
  const float* teacher;            // [slots, pitch], or null
  const Softmax* teacher_softmax;  // [slots]
  RowResult* results;              // the whole list
  int64_t v, pitch;
  float softcap;
};

// Loss has
//   kTeacher: whether a teacher's hidden states may come;
//   __device__ bool counts(int64_t position): whether the position has a target;
//   __device__ RowResult row(const LogitRow<T>& x, const Softmax& s, int64_t position,
//                            const float* teacher, const Softmax& t, float scale): called by all
//       threads of a row; writes x.gradient, scale times that of the row's loss, if it is not null;
//   __device__ void finish(int64_t depth, double extra, int64_t tokens).
template <typename T, typename Loss>
__global__ void __launch_bounds__(kLossThreads)
    loss_rows_kernel(const RowsParams p, const Loss loss) {
  __shared__ float scratch[kLossThreads / kWarp];
  const int i = blockIdx.x;
  if (i >= p.chunk.count()) return;
  const LossRow row = p.chunk.row(i);
  T* const gradients = static_cast<T*>(p.gradients);
  const LogitRow<T> x = {p.logits + i * p.pitch,
                         gradients ? gradients + i * p.pitch : nullptr,
                         p.bias,
                         p.v,
                         p.softcap,
                         scratch};
  const Softmax s = x.softmax();
  __syncthreads();  // the logits are finished
  const int slot = p.teacher ? p.chunk.slot(i) : 0;
  const RowResult result =
      loss.row(x, s, row.target, p.teacher ? p.teacher + slot * p.pitch : nullptr,
               p.teacher ? p.teacher_softmax[slot] : Softmax{}, p.chunk.list->scale[row.depth]);
  if (threadIdx.x == 0) p.results[p.chunk.first + i] = result;
}

template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    teacher_rows_kernel(const RowChunk chunk, float* logits, int64_t pitch, int64_t v,
                        const void* bias, float softcap, Softmax* out) {
  __shared__ float scratch[kLossThreads / kWarp];
  if (static_cast<int>(blockIdx.x) >= chunk.slots()) return;
  const LogitRow<T> x = {logits + blockIdx.x * pitch, nullptr, bias, v, softcap, scratch};
  const Softmax s = x.softmax();
  if (threadIdx.x == 0) out[blockIdx.x] = s;
}

template <typename Loss>
__global__ void __launch_bounds__(kLossThreads)
    sum_up_kernel(const RowList* list, const LossRow* rows, const RowResult* results, int k,
                  const int64_t* num_tokens, float* depth_loss, float* loss, const Loss op) {
  __shared__ double scratch[kLossThreads / kWarp];
  const auto add = [](double a, double b) { return a + b; };
  const int count = list->count;
  double total = 0.0;
  for (int d = 0; d < k; ++d) {
    double losses = 0.0, extras = 0.0;
    for (int i = threadIdx.x; i < count; i += kLossThreads) {
      if (rows[i].depth != d) continue;
      losses += results[i].loss;
      extras += results[i].extra;
    }
    losses = block_reduce<kLossThreads>(losses, scratch, add);
    extras = block_reduce<kLossThreads>(extras, scratch, add);
    if (threadIdx.x != 0) continue;
    const int64_t tokens = num_tokens[d];
    const double mean = tokens > 0 ? losses / static_cast<double>(tokens) : 0.0;
    depth_loss[d] = static_cast<float>(mean);
    total += list->weight[d] * mean;
    op.finish(d, extras, tokens);
  }
  if (threadIdx.x == 0) *loss = static_cast<float>(total);
}

// ---- the loop --------------------------------------------------------------------------------

// Where things lie in the workspace.
struct LossWorkspace {
  static constexpr int kTargetCtas = 256;  // of grad_x = g w
  static constexpr int64_t kTile = 128;

  RowList* list;
  int64_t* bounds;     // [documents + 1]
  LossRow* rows;       // [K * T]
  RowResult* results;  // [K * T]
  char* x;             // [chunk, H]
  float* logits;       // [chunk, pitch]
  char* gradients;     // [chunk, pitch] where they are not f32, and then take the logits' place
  float* parts;        // [part_count, chunk, H]
  char* teacher_x;     // [chunk, H], with a teacher
  float* teacher;      // [chunk, pitch]
  Softmax* teacher_softmax;  // [chunk]
  int64_t chunk, pitch, k_per_part, bytes;
  int part_count;

  LossWorkspace(const MtpLossParams& p, bool teacher_logits) {
    const int64_t size = dtype_bytes(p.dtype);
    const int64_t gradient_size = p.wants_gradient() && p.dtype != DType::kF32 ? size : 0;
    pitch = round_up(p.v, 8);
    chunk = loss_chunk_rows(p.k * p.t, pitch * (4 + gradient_size + (teacher_logits ? 4 : 0)),
                            kCudaLossChunkBytes, kTile, kTile);
    const int64_t tiles = std::max<int64_t>(ceil_div(chunk, kTile), 1) * ceil_div(p.h, kTile);
    const int64_t parts_wanted = std::clamp<int64_t>(kTargetCtas / tiles, 1, 32);
    k_per_part = round_up(ceil_div(p.v, parts_wanted), 32);
    part_count = static_cast<int>(ceil_div(p.v, k_per_part));
    char* at = static_cast<char*>(p.workspace);
    const auto take = [&](int64_t count, int64_t bytes_each) {
      char* const start = at;
      at += round_up(count * bytes_each, 256);
      return start;
    };
    list = reinterpret_cast<RowList*>(take(1, sizeof(RowList)));
    bounds = reinterpret_cast<int64_t*>(take(p.documents + 1, 8));
    rows = reinterpret_cast<LossRow*>(take(p.k * p.t, sizeof(LossRow)));
    results = reinterpret_cast<RowResult*>(take(p.k * p.t, sizeof(RowResult)));
    x = take(chunk * p.h, size);
    logits = reinterpret_cast<float*>(take(chunk * pitch, 4));
    gradients =
        gradient_size ? take(chunk * pitch, gradient_size) : reinterpret_cast<char*>(logits);
    parts = reinterpret_cast<float*>(take(p.grad_hidden ? part_count * chunk * p.h : 0, 4));
    const int64_t slots = teacher_logits ? chunk : 0;
    teacher_x = take(slots * p.h, size);
    teacher = reinterpret_cast<float*>(take(slots * pitch, 4));
    teacher_softmax = reinterpret_cast<Softmax*>(take(slots, sizeof(Softmax)));
    bytes = at - static_cast<char*>(p.workspace);
  }
};

template <typename T, typename Loss>
void run_mtp_loss(const MtpLossParams& p, const Loss& loss, const void* teacher_hidden,
                  int64_t teacher_stride, cudaStream_t stream, const char* op) {
  const LossWorkspace w(p, teacher_hidden != nullptr);
  const ListParams list = {p.cu_seqlens, p.loss_mask, p.depth_weights, p.num_tokens,
                           w.bounds,     w.list,      w.rows,          p.k,
                           p.t,          p.documents, p.shift,         p.dtype == DType::kF16};
  list_rows_kernel<<<1, kListThreads, 0, stream>>>(list, loss);
  check_launch(op);
  if (p.grad_hidden) {
    check(cudaMemsetAsync(p.grad_hidden, 0, p.k * p.t * p.h * 4, stream), op);
  }

  const auto* weight = static_cast<const T*>(p.weight);
  auto* const x = reinterpret_cast<T*>(w.x);
  auto* const teacher_x = reinterpret_cast<T*>(w.teacher_x);
  auto* const g = p.wants_gradient() ? reinterpret_cast<T*>(w.gradients) : nullptr;
  const Matrix<T> by_vocabulary = {weight, p.weight_stride, p.v};
  const auto blocks = static_cast<unsigned>(w.chunk);
  for (int64_t first = 0; first == 0 || first < p.k * p.t; first += w.chunk) {
    const RowChunk chunk = {w.list, w.rows, static_cast<int>(first), static_cast<int>(w.chunk)};
    if (blocks > 0) {
      gather_rows_kernel<T><<<blocks, kLossThreads, 0, stream>>>(
          chunk, static_cast<const T*>(p.hidden), p.depth_stride, p.row_stride, p.t, p.h, x,
          static_cast<const T*>(teacher_hidden), teacher_stride, teacher_x);
      check_launch(op);
      launch_product<T, Order::kInner, Order::kInner, Extent::kRows>(
          chunk, {x, p.h, w.chunk}, by_vocabulary, p.h, 1, p.h, StoreRows{w.logits, w.pitch, 0},
          stream, op);
      if constexpr (Loss::kTeacher) {
        if (teacher_hidden) {
          launch_product<T, Order::kInner, Order::kInner, Extent::kSlots>(
              chunk, {teacher_x, p.h, w.chunk}, by_vocabulary, p.h, 1, p.h,
              StoreRows{w.teacher, w.pitch, 0}, stream, op);
          teacher_rows_kernel<T><<<blocks, kLossThreads, 0, stream>>>(
              chunk, w.teacher, w.pitch, p.v, p.bias, p.softcap, w.teacher_softmax);
          check_launch(op);
        }
      }
      const RowsParams rows = {chunk,
                               w.logits,
                               g,
                               p.bias,
                               teacher_hidden ? w.teacher : nullptr,
                               w.teacher_softmax,
                               w.results,
                               p.v,
                               w.pitch,
                               p.softcap};
      loss_rows_kernel<T><<<blocks, kLossThreads, 0, stream>>>(rows, loss);
      check_launch(op);
    }
    if (p.grad_weight) {
      launch_product<T, Order::kOuter, Order::kOuter, Extent::kDepth>(
          chunk, {g, w.pitch, p.v}, {x, p.h, p.h}, 0, 1, w.chunk,
          AddInUnits{p.grad_weight, p.h, w.list, first > 0}, stream, op);
    }
    if (p.grad_bias) {
      add_columns_kernel<T>
          <<<static_cast<unsigned>(ceil_div<int64_t>(p.v, kLossThreads)), kLossThreads, 0,
             stream>>>(chunk, g, w.pitch, p.v, first > 0, p.grad_bias);
      check_launch(op);
    }
    if (p.grad_hidden && blocks > 0) {
      launch_product<T, Order::kInner, Order::kOuter, Extent::kRows>(
          chunk, {g, w.pitch, w.chunk}, {weight, p.weight_stride, p.h}, p.v, w.part_count,
          w.k_per_part, StoreRows{w.parts, p.h, w.chunk * p.h}, stream, op);
      scatter_rows_kernel<<<blocks, kLossThreads, 0, stream>>>(chunk, w.parts, w.part_count,
                                                               w.chunk * p.h, p.h, p.grad_hidden);
      check_launch(op);
    }
    if (w.chunk == 0) break;
  }
  sum_up_kernel<<<1, kLossThreads, 0, stream>>>(w.list, w.rows, w.results, static_cast<int>(p.k),
                                                p.num_tokens, p.depth_loss, p.loss, loss);
  check_launch(op);
}

template <typename Loss>
void launch_mtp_loss(const MtpLossParams& p, const Loss& loss, const void* teacher_hidden,
                     int64_t teacher_stride, void* stream, const char* op) {
  with_float_type(p.dtype, [&](auto type) {
    run_mtp_loss<decltype(type)>(p, loss, teacher_hidden, teacher_stride,
                                 static_cast<cudaStream_t>(stream), op);
  });
}

}  // namespace mtp::cuda

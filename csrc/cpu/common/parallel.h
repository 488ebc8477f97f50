// The one parallel loop. It runs on the OpenMP runtime that torch has already loaded, so
// torch.set_num_threads holds here too and no second thread pool competes for the cores.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mtp::cpu {
inline namespace MTP_ISA {

inline int max_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Calls body(begin, end, thread) on disjoint ranges that cover [0, n). Ranges are multiples of
// `grain` (but the last), and no more threads join than there are grains. `thread` is below
// max_threads(): an index into per-thread scratch.
template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  const int64_t grains = (n + grain - 1) / grain;
  const int threads = static_cast<int>(std::min<int64_t>(max_threads(), grains));
  if (threads <= 1) {
    body(int64_t{0}, n, 0);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = grains * t / team * grain;
    const int64_t end = std::min(n, grains * (t + 1) / team * grain);
    if (begin < end) body(begin, end, static_cast<int>(t));
  }
#endif
}

// As parallel_for, for items of uneven cost: threads take one item after the other.
template <typename Body>
void parallel_for_dynamic(int64_t n, const Body& body) {
  if (n <= 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(max_threads(), n));
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i, 0);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
#endif
}

}  // namespace MTP_ISA
}  // namespace mtp::cpu

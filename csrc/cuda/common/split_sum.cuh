// Sums over parts of k that different CTAs computed, in one launch: every CTA stores its part, and
// the last one to arrive at a tile adds all parts in order. Which CTA that is varies, the result
// does not.
//
// The workspace comes uninitialised and clearing it would take a launch of its own. So a ticket
// counts from a base that the launcher drew at random: any other value means that nobody has been
// there, be it what the memory held before or the end of an earlier run of the same captured graph.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace mtp::cuda {

// Every thread of the CTA calls this after its stores; all get whether the CTA is the last of
// `parties`, which then sees what the others stored. `flag` is in shared memory.
__device__ __forceinline__ bool last_to_arrive(unsigned long long* ticket, unsigned long long base,
                                               int parties, int* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned long long seen = *static_cast<volatile unsigned long long*>(ticket), arrived;
    for (;;) {
      arrived = seen - base;
      if (arrived >= static_cast<unsigned long long>(parties)) arrived = 0;
      const unsigned long long before = atomicCAS(ticket, seen, base + arrived + 1);
      if (before == seen) break;
      seen = before;
    }
    *flag = arrived + 1 == static_cast<unsigned long long>(parties);
    __threadfence();
  }
  __syncthreads();
  return *flag != 0;
}

// A base that no other launch has (splitmix64).
inline unsigned long long draw_ticket_base() {
  static std::atomic<uint64_t> state{
      static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count())};
  uint64_t x = state.fetch_add(0x9e3779b97f4a7c15u);
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

}  // namespace mtp::cuda

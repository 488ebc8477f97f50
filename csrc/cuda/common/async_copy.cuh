// Asynchronous copies from global to shared memory (cp.async), and the cache hints they carry.
#pragma once

#include <cstdint>

namespace mtp::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// For data that is read once: the L2 lines go first when room is needed.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies `bytes` <= 16 bytes past L1 and fills up with zeros; of 0 bytes nothing is read.
__device__ __forceinline__ void copy16(uint32_t to_shared, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy16(uint32_t to_shared, const void* from, bool valid) {
  copy16(to_shared, from, valid ? 16 : 0);
}

__device__ __forceinline__ void copy16(uint32_t to_shared, const void* from, bool valid,
                                       uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to_shared),
               "l"(from), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

// For rows that are only aligned to 8 bytes.
__device__ __forceinline__ void copy8(uint32_t to_shared, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to_shared), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy8(uint32_t to_shared, const void* from, bool valid) {
  copy8(to_shared, from, valid ? 8 : 0);
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's newest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace mtp::cuda

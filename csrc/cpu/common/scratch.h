// Per-thread working memory of kernels whose need depends on a thread's share of the work. Each
// slot is kept for the next call and grows when a larger one comes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace mtp::cpu {
inline namespace MTP_ISA {

// 64-byte aligned, contents undefined; valid until the same thread asks for the same slot again.
template <typename T, int kSlot = 0>
T* scratch(int64_t count) {
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  const size_t bytes = static_cast<size_t>(count) * sizeof(T);
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(::operator new(bytes, std::align_val_t{64}));
    capacity = bytes;
  }
  return static_cast<T*>(memory.get());
}

}  // namespace MTP_ISA
}  // namespace mtp::cpu

// Where operators are registered. MTP_NAMESPACE is `mtp` in the shipped library; the simulator
// build of the tests compiles the same sources under another name, so both load in one process.
#pragma once

#include <torch/library.h>

#ifndef MTP_NAMESPACE
#define MTP_NAMESPACE mtp
#endif

// One more expansion step, because torch's macros paste their first argument.
#define MTP_TORCH_LIBRARY(ns, m) TORCH_LIBRARY(ns, m)
#define MTP_TORCH_LIBRARY_IMPL(ns, key, m) TORCH_LIBRARY_IMPL(ns, key, m)

#define MTP_LIBRARY(m) MTP_TORCH_LIBRARY(MTP_NAMESPACE, m)

// Registers `fn` as operator `op` on every device this build serves. The function itself picks
// the CPU or the CUDA launcher from its tensors' device, so checks and outputs exist once.
#if defined(MTP_WITH_CUDA) && !defined(MTP_PTXSIM)
#define MTP_REGISTER(op, fn)                                                   \
  MTP_TORCH_LIBRARY_IMPL(MTP_NAMESPACE, CPU, m) { m.impl(#op, TORCH_FN(fn)); } \
  MTP_TORCH_LIBRARY_IMPL(MTP_NAMESPACE, CUDA, m) { m.impl(#op, TORCH_FN(fn)); }
#else
#define MTP_REGISTER(op, fn) \
  MTP_TORCH_LIBRARY_IMPL(MTP_NAMESPACE, CPU, m) { m.impl(#op, TORCH_FN(fn)); }
#endif

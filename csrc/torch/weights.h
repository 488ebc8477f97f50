// Checks shared by the operators that stream a weight matrix: skinny_linear, head_topk, eh_proj.
#pragma once

#include <algorithm>

#include "common.h"

namespace mtp::binding {

// f32, f16 or bf16; or int8 or float8_e4m3fn, which need one f32 scale per row.
inline void check_weight(const Checker& check, const char* name, const at::Tensor& weight,
                         std::initializer_list<Dim> dims,
                         const std::optional<at::Tensor>& weight_scale) {
  check.device(name, weight);
  check.dtype(name, weight, {at::kFloat, at::kHalf, at::kBFloat16, at::kChar, at::kFloat8_e4m3fn});
  check.shape(name, weight, dims);
  check.rows_contiguous(name, weight);
  const bool quantised =
      weight.scalar_type() == at::kChar || weight.scalar_type() == at::kFloat8_e4m3fn;
  check.require(quantised == weight_scale.has_value(), "weight_scale must ",
                quantised ? "be given for" : "be None unless weight is Char or Float8_e4m3fn, got",
                quantised ? " a weight of dtype " : " one with a weight of dtype ",
                weight.scalar_type());
  check.tensor("weight_scale", weight_scale, {{dims.begin()->name, weight.size(0)}}, {at::kFloat});
}

// The CUDA kernels take whole multiples of 8 elements, in pieces of 16 bytes; one-byte elements
// also in pieces of 8.
inline void check_cuda_rows(const Checker& check, const char* name, const at::Tensor& t) {
  if (!runs_on_cuda(t) || t.numel() == 0) return;
  const int64_t multiple = std::min<int64_t>(8, 16 / t.element_size());
  const int64_t bytes = multiple * t.element_size();
  check.require(t.size(-1) % 8 == 0, name,
                " must have a last dimension that is a multiple of 8 on "
                "cuda, got ",
                t.size(-1));
  check.require(t.size(0) <= 1 || t.stride(0) % multiple == 0, name,
                " must have a row stride that is a multiple of ", multiple,
                " elements on cuda, got ", t.stride(0));
  check.require(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0, name,
                " must be aligned to ", bytes, " bytes on cuda");
}

}  // namespace mtp::binding

// wgmma on sm_90a through CuTe: a warpgroup of 128 threads multiplies 64 rows of a stage in shared
// memory with its 128 columns, asynchronously, into 64 accumulator registers per thread.
//
// Both operands are read where they lie, in two of wgmma's canonical layouts: k innermost in rows
// of 64 bytes (32 steps of k), the rows' dimension innermost in rows of 128 bytes. Of 128 x 128
// sums the first warpgroup holds rows 0 .. 63; there a thread of warp w has those of 16 x 8 blocks
// that mma.sync would give it, at row 16 w and columns 0, 8, .. 120.
#pragma once

#if defined(MTP_WITH_CUTLASS)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cutlass/arch/barrier.h>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#endif

namespace mtp::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && defined(MTP_WITH_CUTLASS)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

template <typename T, bool kOuterA, bool kOuterB>
struct Wgmma;

#if defined(MTP_WITH_CUTLASS)
// kOuter: k is the outer dimension of the operand in memory.
template <typename T, bool kOuterA, bool kOuterB>
struct Wgmma {
  static_assert(sizeof(T) == 2, "f16 and bf16");
  static constexpr int kThreads = 128, kTile = 128, kDepth = 32;
  using Value = std::conditional_t<std::is_same_v<T, __half>, cute::half_t, cute::bfloat16_t>;
  using Tile = cute::Shape<cute::Int<kTile>, cute::Int<kTile>, cute::Int<kDepth>>;

  template <bool kOuter>
  static constexpr auto kMajor = kOuter ? cute::SM90::GMMA::Major::MN : cute::SM90::GMMA::Major::K;

  template <bool kOuter>
  using Layout = decltype(cute::tile_to_shape(
      std::conditional_t<kOuter, cute::SM90::GMMA::Layout_MN_SW128_Atom<Value>,
                         cute::SM90::GMMA::Layout_K_SW64_Atom<Value>>{},
      cute::Shape<cute::Int<kTile>, cute::Int<kDepth>>{}, cute::Step<cute::_2, cute::_1>{}));

  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::ss_op_selector<Value, Value, float, Tile, kMajor<kOuterA>,
                                       kMajor<kOuterB>>(),
      cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));

  // Where an element of a stage lies, in bytes.
  template <bool kOuter>
  static constexpr int offset(int row, int k) {
    const Layout<kOuter> layout;
    return layout.layout_a()(static_cast<int>(layout.layout_b()(row, k) * sizeof(T)));
  }

  template <bool kOuter>
  static __device__ __forceinline__ auto operand(const unsigned char* stage) {
    return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<const Value*>(stage)),
                             Layout<kOuter>{});
  }

  // Makes this thread's finished copies visible to wgmma, once a barrier has followed.
  static __device__ __forceinline__ void publish_copies() {
    cutlass::arch::fence_view_async_shared();
  }

  // Begins acc += a b^T. Both stages must stay as they are until wait() in both warpgroups.
  static __device__ __forceinline__ void start(const unsigned char* a, const unsigned char* b,
                                               float (&acc)[16][4]) {
    const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kThreads, 0);
    const auto mma = Mma{}.get_thread_slice(group * kThreads);
    const auto of_a = mma.make_fragment_A(mma.partition_A(operand<kOuterA>(a)));
    const auto of_b = mma.make_fragment_B(mma.partition_B(operand<kOuterB>(b)));
    auto sums =
        cute::make_tensor(&acc[0][0], cute::partition_shape_C(Mma{}, cute::take<0, 2>(Tile{})));
    pin(acc);
    cute::warpgroup_arrive();
    cute::gemm(Mma{}, of_a, of_b, sums);
    cute::warpgroup_commit_batch();
  }

  // Until only the newest kPending of what this warpgroup has started are under way.
  template <int kPending>
  static __device__ __forceinline__ void wait(float (&acc)[16][4]) {
    cute::warpgroup_wait<kPending>();
    pin(acc);
  }

 private:
  // Keeps the compiler from moving uses of the sums to the other side.
  static __device__ __forceinline__ void pin(float (&acc)[16][4]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) cute::warpgroup_fence_operand(acc[i / 4][i % 4]);
  }
};
#endif

}  // namespace mtp::cuda

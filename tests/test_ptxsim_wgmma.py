"""wgmma on the simulator: operand layouts, arithmetic, and what may be touched when."""

import itertools

import numpy as np
import pytest
from ptxsim import errors
from ptxsim.harness import compile_cuda, cutlass_headers, nvcc, ptx_kernel, run

RNG = np.random.default_rng(11)

WIDTHS = {0: 16, 3: 32, 2: 64, 1: 128}  # swizzle mode of a descriptor: bytes of a row


# --- layouts and arithmetic, from PTX --------------------------------------------------------


def place(image, x, start, mode, outer, base=0):
    """Writes x [rows, 16] into an image of shared memory; returns its descriptor without start.

    Blocks of 8 rows of 16 bytes, or of a swizzled row's width, lie side by side with gaps.
    """
    width, rows = WIDTHS[mode], len(x)
    block = 8 * width
    if outer:  # rows of the image are steps of k, with `width` bytes of one step side by side
        per = width // 2
        across, down = block + 1024, (rows // per + 1) * (block + 1024)
        leading, stride = (down, across) if mode == 0 else (across, down)
    else:
        leading, stride = (5 * 1024, 128) if mode == 0 else (16, block + 1024)
    for i, k in itertools.product(range(rows), range(16)):
        if outer:
            at = start + i % per * 2 + i // per * across + k % 8 * width + k // 8 * down
        else:
            at = start + i % 8 * width + i // 8 * stride + k // 8 * leading + k % 8 * 2
        at ^= ((at >> 7) - base) % (width // 16) << 4
        image[at : at + 2] = x[i, k : k + 1].view(np.uint8)
    return leading >> 4 << 16 | stride >> 4 << 32 | base << 49 | mode << 62


def encode(x, t):
    if t == "f16":
        return x.astype(np.float16).view("u2")
    return (x.astype(np.float32).view("u4") + np.uint32(0x8000) >> 16).astype("u2")


def decode(bits, t):
    if t == "f16":
        return bits.view(np.float16).astype("f8")
    return (bits.astype("u4") << 16).view("f4").astype("f8")


def fragment(x):
    """[rows of 16 per warp, columns] as registers [thread, column block, upper or lower, 2]."""
    rows, columns = x.shape
    split = x.reshape(rows // 16, 2, 8, columns // 8, 4, 2)  # warp, half, g, block, t, i
    return split.transpose(0, 2, 4, 3, 1, 5).reshape(rows * 2, columns // 8, 2, 2)


def unfragment(regs, columns):
    split = regs.reshape(4, 8, 4, columns // 8, 2, 2).transpose(0, 4, 1, 3, 2, 5)
    return split.reshape(64, columns)


def multiply(
    n, *, d_type="f32", in_type="bf16", modes=(0, 0), outer=(False, False), scale_d=1, signs=(1, 1),
    start=0, base=0, a_registers=False,
):  # fmt: skip
    """One wgmma of random operands; its result and the exact one."""
    a, b = (encode(RNG.normal(size=(rows, 16)), in_type) for rows in (64, n))
    d = RNG.normal(size=(64, n))
    image = np.zeros(160 * 1024, np.uint8)
    b_at = 80 * 1024
    high_a = place(image, a, start, modes[0], outer[0], base)
    high_b = place(image, b, b_at, modes[1], outer[1])
    d = d.astype(np.float32 if d_type == "f32" else np.float16)
    registers = np.ascontiguousarray(fragment(d)).view("u4").reshape(128, -1)
    of_a = np.ascontiguousarray(fragment(a)).view("u4").reshape(128, 4)
    count = registers.shape[1]
    ds = ", ".join(f"%d{i}" for i in range(count))
    left = "{%f0, %f1, %f2, %f3}" if a_registers else "%da"
    flags = f"{int(outer[1])}" if a_registers else f"{int(outer[0])}, {int(outer[1])}"
    body = [
        f".reg .b32 %d<{count}>; .reg .b32 %f<4>; .reg .b32 %v<4>; .reg .b32 %s; .reg .b64 %q;",
        ".reg .b64 %da; .reg .b64 %db; .reg .pred %keep; .reg .b32 %at;",
        "shl.b32 %at, %t, 4; cvt.u64.u32 %q, %at; add.u64 %q, %q, %p1;",
        "mov.u32 %s, smem; add.u32 %at, %at, %s;",
    ]
    for i in range(len(image) // 2048):
        body += [
            f"ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%q+{2048 * i}];",
            f"st.shared.v4.b32 [%at+{2048 * i}], {{%v0, %v1, %v2, %v3}};",
        ]
    body += ["fence.proxy.async.shared::cta;", "bar.sync 0;"]
    body += [f"mad.wide.u32 %q, %t, {4 * count}, %p0;"]
    body += [f"ld.global.b32 %d{i}, [%q+{4 * i}];" for i in range(count)]
    body += ["mad.wide.u32 %q, %t, 16, %p2;"]
    body += [f"ld.global.b32 %f{i}, [%q+{4 * i}];" for i in range(4)]
    for name, at, high in (("%da", start, high_a), ("%db", b_at, high_b)):
        body += [
            f"mov.u32 %s, smem; add.u32 %s, %s, {at}; shr.u32 %s, %s, 4; cvt.u64.u32 {name}, %s;",
            f"or.b64 {name}, {name}, {high};",
        ]
    body += [
        f"setp.ne.u32 %keep, {scale_d}, 0;",
        "wgmma.fence.sync.aligned;",
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.{d_type}.{in_type}.{in_type} {{{ds}}}, {left}, "
        f"%db, %keep, {signs[0]}, {signs[1]}, {flags};",
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
        f"mad.wide.u32 %q, %t, {4 * count}, %p0;",
    ]
    body += [f"st.global.b32 [%q+{4 * i}], %d{i};" for i in range(count)]
    module = ptx_kernel("\n".join(body), 3, shared=len(image))
    report = run(module, "k", 1, 128, registers, image, of_a)
    assert report.mma == 4
    got = registers.view("f4" if d_type == "f32" else "f2").reshape(128, -1)
    product = signs[0] * signs[1] * (decode(a, in_type) @ decode(b, in_type).T)
    return unfragment(got, n), (product + scale_d * d.astype("f8")).astype(d.dtype)


def assert_equal(got, want):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("outer", list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("modes", list(itertools.product(WIDTHS, repeat=2)))
def test_layouts(modes, outer) -> None:
    fits = [n for n in (8, 24, 64, 128, 256) if not outer[1] or n * 2 % WIDTHS[modes[1]] == 0]
    assert_equal(*multiply(fits[(modes[0] + outer[0]) % len(fits)], modes=modes, outer=outer))


@pytest.mark.parametrize("in_type,d_type", [("bf16", "f32"), ("f16", "f32"), ("f16", "f16")])
def test_types_scales_and_signs(in_type, d_type) -> None:
    for scale_d, signs in itertools.product((0, 1), itertools.product((1, -1), repeat=2)):
        options = {"in_type": in_type, "d_type": d_type, "scale_d": scale_d, "signs": signs}
        assert_equal(*multiply(16, **options))
        assert_equal(*multiply(16, **options, a_registers=True, modes=(0, 1)))


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_base_offset(mode) -> None:
    start = 384  # three rows of 128 bytes behind the alignment of the swizzle
    assert_equal(*multiply(8, modes=(mode, 0), start=start, base=start >> 7))


# --- CuTe ------------------------------------------------------------------------------------

CUTE = r"""
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cutlass/arch/barrier.h>
using namespace cute;
using SM90::GMMA::Major;
using TileShape = Shape<_64, _128, _64>;

template <Major kA, Major kB, bool kRegisters>
constexpr auto atom() {
  if constexpr (kRegisters) {
    return SM90::GMMA::rs_op_selector<half_t, half_t, float, TileShape, kA, kB>();
  } else {
    return SM90::GMMA::ss_op_selector<half_t, half_t, float, TileShape, kA, kB>();
  }
}

template <typename AtomA, typename AtomB, Major kA, Major kB, bool kRegisters>
__device__ void multiply_tile(const half_t* a, const half_t* b, float* c) {
  extern __shared__ __align__(1024) half_t smem[];
  const auto layout_a = tile_to_shape(AtomA{}, Shape<_64, _64>{});
  const auto layout_b = tile_to_shape(AtomB{}, Shape<_128, _64>{});
  auto sA = make_tensor(make_smem_ptr(smem), layout_a);
  auto sB = make_tensor(make_smem_ptr(smem + 64 * 64), layout_b);
  for (int i = threadIdx.x; i < 64 * 64; i += 128) sA(i / 64, i % 64) = a[i];
  for (int i = threadIdx.x; i < 128 * 64; i += 128) sB(i / 64, i % 64) = b[i];
  cutlass::arch::fence_view_async_shared();
  __syncthreads();
  auto mma = make_tiled_mma(atom<kA, kB, kRegisters>());
  auto thread = mma.get_thread_slice(threadIdx.x);
  auto gC = make_tensor(make_gmem_ptr(c), Layout<Shape<_64, _128>, Stride<_128, _1>>{});
  auto rC = partition_fragment_C(mma, Shape<_64, _128>{});
  auto rB = thread.make_fragment_B(thread.partition_B(sB));
  clear(rC);
  if constexpr (kRegisters) {
    auto rA = thread.partition_fragment_A(sA);
    copy(thread.partition_A(sA), rA);
    warpgroup_fence_operand(rC);
    warpgroup_arrive();
    gemm(mma, rA, rB, rC);
  } else {
    auto rA = thread.make_fragment_A(thread.partition_A(sA));
    warpgroup_fence_operand(rC);
    warpgroup_arrive();
    gemm(mma, rA, rB, rC);
  }
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(rC);
  copy(rC, thread.partition_C(gC));
}

#define KERNEL(NAME, A, B, KA, KB, REGISTERS)                                   \
  extern "C" __global__ void NAME(const half_t* a, const half_t* b, float* c) { \
    using SM90::GMMA::A, SM90::GMMA::B;                                         \
    multiply_tile<A<half_t>, B<half_t>, Major::KA, Major::KB, REGISTERS>(a, b, c); \
  }
"""
# Every swizzle of either operand with every major-ness; the other operand goes around the wheel.
KINDS = list(itertools.product(("K", "MN"), ("INTER", "SW32", "SW64", "SW128")))
PAIRS = [(a, KINDS[(3 * i + 1) % 8], i % 3 == 0 and a[0] == "K") for i, a in enumerate(KINDS)]


@pytest.fixture(scope="module")
def cute():
    include = cutlass_headers()
    if include is None or nvcc() is None:
        pytest.skip("needs nvcc and the nvidia-cutlass package")
    kernels = [
        f"KERNEL(k{i}, Layout_{a[0]}_{a[1]}_Atom, Layout_{b[0]}_{b[1]}_Atom, {a[0]}, {b[0]}, "
        f"{'true' if registers else 'false'})"
        for i, (a, b, registers) in enumerate(PAIRS)
    ]
    flags = (f"-I{include}", "--expt-relaxed-constexpr")
    return compile_cuda("\n".join([CUTE, *kernels]), flags=flags)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("i", range(len(PAIRS)), ids=[f"{a}-{b}-{r}" for a, b, r in PAIRS])
def test_cute_product(cute, i: int, seed) -> None:
    a, b = (RNG.integers(-8, 9, (rows, 64)).astype(np.float16) for rows in (64, 128))
    c = np.zeros((64, 128), np.float32)
    report = run(cute, f"k{i}", 1, 128, a, b, c, dynamic_smem=(64 + 128) * 64 * 2, seed=seed)
    np.testing.assert_array_equal(c, a.astype("f8") @ b.astype("f8").T)
    assert report.mma == 4 * 64 // 16


# --- planted bugs ----------------------------------------------------------------------------

BUGS = r"""
#include <cstdint>
#include <cuda_fp16.h>
__device__ inline uint32_t sptr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ inline uint64_t descriptor(const void* p) {  // no swizzle; see at()
  return sptr(p) >> 4 | 128ull >> 4 << 16 | 256ull >> 4 << 32;
}
__device__ inline int at(int row, int k) {
  return row / 8 * 128 + k / 8 * 64 + row % 8 * 8 + k % 8;
}
__device__ inline void wgmma(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, "
               "1, 1, 1, 0, 0;" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "l"(a), "l"(b) : "memory");
}
__device__ inline void wgmma(float (&d)[4], uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b) : "memory");
}
__device__ inline void wgmma16(float (&d)[4], uint64_t a, uint64_t b) {
  float e[4] = {0, 0, 0, 0};
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, "
               "%7}, %8, %9, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(e[0]), "+f"(e[1]),
                 "+f"(e[2]), "+f"(e[3])
               : "l"(a), "l"(b) : "memory");
}
#define COPY(TO, FROM) \
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(sptr(TO)), "l"(FROM))
#define FENCE() asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#define COMMIT() asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")
#define WAIT(N) asm volatile("wgmma.wait_group.sync.aligned " #N ";" ::: "memory")
#define PUBLISH() asm volatile("fence.proxy.async.shared::cta;" ::: "memory")
#define USE(X) asm volatile("" : "+f"(X[0]), "+f"(X[1]), "+f"(X[2]), "+f"(X[3]))

enum Bug { kNone, kNoFence, kTouched, kOtherShape, kReadInFlight, kNotCommitted, kFragmentTouched,
           kOverwritten, kCopiedOver, kNoBarrierBehind, kNotPublished, kCopyNotPublished,
           kPublishedBefore, kOneWarpPublishes, kNoBarrier, kHalfWarpgroup, kHalfWarps,
           kDescriptors, kOutside, kUninitialized };

// c = 3 a b^T (64 x 8 x 16) by three wgmmas: from stores, from cp.async, with a in registers.
template <int kBug>
__device__ void product(const __half* a, const __half* b, float* c) {
  __shared__ __align__(128) __half s[2][72 * 16];
  const int t = threadIdx.x;
  if (kBug == kPublishedBefore) PUBLISH();
  for (int i = t * 8; i < 72 * 16; i += 128 * 8) {
    if (kBug == kUninitialized && i == 72 * 16 - 8) continue;
    const __half* from = i < 64 * 16 ? a + i : b + i - 64 * 16;
    *reinterpret_cast<uint4*>(&s[0][at(i / 16, i % 16)]) = *reinterpret_cast<const uint4*>(from);
  }
  if (kBug == kCopyNotPublished) PUBLISH();
  for (int i = t * 8; i < 72 * 16; i += 128 * 8) {
    const __half* from = i < 64 * 16 ? a + i : b + i - 64 * 16;
    COPY(&s[1][at(i / 16, i % 16)], from);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (kBug == kOneWarpPublishes) {
    if (t < 32) PUBLISH();
  } else if (kBug != kNotPublished && kBug != kCopyNotPublished && kBug != kPublishedBefore) {
    PUBLISH();
  }
  if (kBug != kNoBarrier) __syncthreads();

  const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  uint32_t fragment[4];
  for (int i = 0; i < 4; ++i) {
    const __half* from = a + (row + i % 2 * 8) * 16 + column + i / 2 * 8;
    fragment[i] = *reinterpret_cast<const uint32_t*>(from);
  }
  float d[4] = {0, 0, 0, 0};
  const __half* left = s[0];
  if (kBug == kDescriptors && t >= 96) left = s[1];
  if (kBug == kOutside) left = s[1] + 64 * 16;
  if (kBug == kHalfWarpgroup && t >= 64) return;
  if (kBug == kHalfWarps && t % 32 >= 16) return;
  USE(d);
  if (kBug != kNoFence) FENCE();
  wgmma(d, descriptor(left), descriptor(s[0] + 64 * 16));
  COMMIT();
  if (kBug == kTouched) {
    WAIT(0);
    for (float& x : d) x += 1.0f;
    USE(d);
  }
  if (kBug == kOtherShape) wgmma16(d, descriptor(s[1]), descriptor(s[1]));
  wgmma(d, descriptor(s[1]), descriptor(s[1] + 64 * 16));
  COMMIT();
  if (kBug == kOverwritten) s[1][t] = __half(0.0f);
  if (kBug == kCopiedOver) COPY(&s[1][t * 8], a);
  WAIT(1);
  if (kBug != kNoBarrierBehind) __syncthreads();
  s[0][t] = __half(0.0f);
  wgmma(d, fragment, descriptor(s[1] + 64 * 16));
  if (kBug != kNotCommitted) COMMIT();
  if (kBug == kFragmentTouched) asm volatile("add.u32 %0, %0, 1;" : "+r"(fragment[0]));
  if (kBug != kReadInFlight) WAIT(0);
  USE(d);
  for (int i = 0; i < 4; ++i) c[(row + i / 2 * 8) * 8 + column + i % 2] = d[i];
}
#define KERNEL(N)                                                            \
  extern "C" __global__ void k##N(const __half* a, const __half* b, float* c) { \
    product<N>(a, b, c);                                                     \
  }
"""

OUTCOMES = [
    None,
    (errors.SharedRace, r"without wgmma\.fence: the warpgroup's first"),
    (errors.SharedRace, r"without wgmma\.fence: %\w+ was used otherwise"),
    (errors.SharedRace, r"without wgmma\.fence: %\w+ was used otherwise"),
    (errors.SharedRace, "belongs to a wgmma in flight"),
    (errors.SharedRace, "belongs to a wgmma in flight"),
    (errors.SharedRace, "belongs to a wgmma in flight"),
    (errors.SharedRace, "write of bytes that a wgmma in flight reads"),
    (errors.SharedRace, "write of bytes that a wgmma in flight reads"),
    (errors.SharedRace, "write of bytes that a wgmma of threads 0 to 127 read"),
    (errors.SharedRace, r"without a fence\.proxy\.async"),
    (errors.SharedRace, r"without a fence\.proxy\.async"),
    (errors.SharedRace, r"without a fence\.proxy\.async"),
    (errors.SharedRace, r"without a fence\.proxy\.async"),
    (errors.SharedRace, "without a barrier between"),
    (errors.BarrierError, "all of its 128 threads"),
    (errors.BarrierError, "all of its 128 threads"),
    (errors.BarrierError, "a descriptor differs within a warpgroup"),
    (errors.OutOfBounds, "wgmma reads outside"),
    (errors.UninitializedShared, "wgmma"),
]
NAMES = BUGS.split("enum Bug {")[1].split("}")[0].replace(",", " ").split()


@pytest.fixture(scope="module")
def bugs():
    if nvcc() is None:
        pytest.skip("nvcc is missing")
    return compile_cuda("\n".join([BUGS, *(f"KERNEL({i})" for i in range(len(NAMES)))]))


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("bug", range(len(NAMES)), ids=NAMES)
def test_planted_bug(bugs, bug: int, seed) -> None:
    a, b = (RNG.integers(-8, 9, (rows, 16)).astype(np.float16) for rows in (64, 8))
    c = np.zeros((64, 8), np.float32)
    if OUTCOMES[bug] is None:
        run(bugs, f"k{bug}", 1, 128, a, b, c, seed=seed)
        np.testing.assert_array_equal(c, 3 * (a.astype("f8") @ b.astype("f8").T))
    else:
        kind, message = OUTCOMES[bug]
        with pytest.raises(kind, match=message):
            run(bugs, f"k{bug}", 1, 128, a, b, c, seed=seed)


def test_divergent_warps() -> None:
    """Two warps of a warpgroup go another way, to a barrier, and never reach the fence."""
    module = ptx_kernel(
        """.reg .pred %q; setp.lt.u32 %q, %t, 64;
        @%q bra other;
        wgmma.fence.sync.aligned;
        other: bar.sync 0;""",
        0,
    )
    with pytest.raises(errors.BarrierError, match="warps of their warpgroups"):
        run(module, "k", 1, 128)

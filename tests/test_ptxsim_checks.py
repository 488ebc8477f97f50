"""Every check of the simulator catches the bug planted for it and passes the corrected kernel."""

import numpy as np
import pytest
from ptxsim import errors
from ptxsim.engine import A100, Checks
from ptxsim.harness import compile_cuda, nvcc, ptx_kernel, run

pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc is missing")

SOURCE = r"""
#include <cstdint>
#include <cassert>
__device__ inline uint32_t sptr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Each kernel has its bug under `bug`, so that the corrected code is the same otherwise.
__global__ void past_end(const float* x, float* y, int n, int bug) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n + bug) y[i] = x[i];
}
__global__ void misaligned(const float* x, float4* y, int bug) {
  y[threadIdx.x] = *(const float4*)(x + 4 * threadIdx.x + bug);
}
__global__ void shared_past_end(float* y, int bug) {
  __shared__ float s[64];
  s[threadIdx.x + bug] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void uninitialized(float* y, int bug) {
  __shared__ float s[64];
  if (threadIdx.x < 64 - bug) s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void read_after_write(const float* x, float* y, int bug) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  if (!bug) __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];
}
__global__ void write_after_read(const float* x, float* y, int bug) {
  __shared__ float s[128];
  float sum = 0;
  for (int k = 0; k < 3; k++) {
    s[threadIdx.x] = x[threadIdx.x] + k;
    __syncthreads();
    sum += s[127 - threadIdx.x];
    if (!bug) __syncthreads();
  }
  y[threadIdx.x] = sum;
}
__global__ void write_after_write(float* y, int bug) {
  __shared__ int s[32];
  if (threadIdx.x < 32) s[threadIdx.x] = 1;
  if (!bug) __syncthreads();
  if (threadIdx.x >= 96) s[threadIdx.x - 96] = 2;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x % 32];
}
__global__ void same_instruction(float* y, int bug) {
  __shared__ int s[32];
  s[threadIdx.x % 32] = bug ? threadIdx.x : 7;   // one value from all is no race
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x % 32];
}
__global__ void warp_exchange(const float* x, float* y, int bug) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  if (!bug) __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void async_copy(const float4* x, float4* y, int bug) {
  __shared__ float4 s[128];
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(sptr(&s[threadIdx.x])),
               "l"(x + threadIdx.x));
  asm volatile("cp.async.commit_group;");
  if (!bug) asm volatile("cp.async.wait_group 0;" ::: "memory");
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void async_copy_no_barrier(const float4* x, float4* y, int bug) {
  __shared__ float4 s[128];
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(sptr(&s[threadIdx.x])),
               "l"(x + threadIdx.x));
  asm volatile("cp.async.wait_all;" ::: "memory");
  if (!bug) __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];
}
__global__ void ring(const float4* x, float4* y, int bug) {  // two stages, prefetch distance one
  __shared__ float4 s[2][64];
  auto load = [&](int k) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(sptr(&s[k & 1][threadIdx.x])),
                 "l"(x + 64 * k + threadIdx.x));
    asm volatile("cp.async.commit_group;");
  };
  float4 sum = {0, 0, 0, 0};
  load(0);
  for (int k = 0; k < 4; k++) {
    if (k < 3) {
      load(k + 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    sum.x += s[k & 1][63 - threadIdx.x].x;
    if (!bug) __syncthreads();  // without it the next load overwrites what others still read
  }
  y[threadIdx.x] = sum;
}
__global__ void cta_writes(float* y, int bug) {
  if (threadIdx.x == 0) y[bug ? 0 : blockIdx.x] = blockIdx.x;
}
__global__ void cta_reads(float* y, int bug) {  // reads what another CTA writes
  y[blockIdx.x * 32 + threadIdx.x] = 1;
  if (bug) y[blockIdx.x * 32 + threadIdx.x] = y[(blockIdx.x ^ 1) * 32 + threadIdx.x] + 1;
}
__global__ void cta_write_after_read(const float* in, float* y, int bug) {
  float v = y[256 + threadIdx.x];  // all CTAs read, then one writes
  if (bug && blockIdx.x == 3) y[256 + threadIdx.x] = v + 1;
  y[blockIdx.x * 32 + threadIdx.x] = v;
}
__global__ void last_block(const float* x, float* partial, unsigned* counter, float* out, int bug) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    if (!bug) __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < gridDim.x; i++) sum += partial[i];
    *out = sum;
    *counter = 0;
  }
}
__global__ void noncoherent(float* y, int bug) {
  y[threadIdx.x] = 1;
  y[threadIdx.x] = __ldg(y + threadIdx.x + (bug ? 0 : 32)) + 1;
}
__global__ void divergent(float* y, int bug) {
  if (bug && threadIdx.x % 2) {
    asm volatile("bar.sync 0;");
    y[threadIdx.x] = 1;
  } else {
    asm volatile("bar.sync 0;");
    y[threadIdx.x] = 2;
  }
}
__global__ void some_never_arrive(float* y, int bug) {
  if (bug && threadIdx.x < 32) {
    asm volatile("bar.sync 1, 96;");
  } else {
    asm volatile("bar.sync 2, %0;" ::"r"(bug ? 96 : 128));
  }
  y[threadIdx.x] = 1;
}
__global__ void counts_differ(float* y, int bug) {
  int count = threadIdx.x < 32 && bug ? 64 : 128;
  asm volatile("bar.sync 1, %0;" ::"r"(count));
  y[threadIdx.x] = 1;
}
__global__ void half_a_warp(float* y, int bug) {
  float v = threadIdx.x;
  if (!bug || threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  __syncthreads();
  y[threadIdx.x] = v;
}
__global__ void endless(float* y, int bug) {
  volatile float* p = y;
  while (bug && p[0] == 0) {}
  y[1] = 1;
}
__global__ void asserts(float* y, int bug) {
  assert(threadIdx.x + bug < 128);
  y[threadIdx.x] = 1;
}
__global__ void traps(float* y, int bug) {
  if (bug && threadIdx.x == 77) __trap();
  y[threadIdx.x] = 1;
}
__global__ void big_local(float* y, int bug) {
  float s[16];
  for (int i = 0; i < 16; i++) s[i] = y[i];
  y[threadIdx.x] = s[(threadIdx.x & 15) + bug];
}
"""


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def kernels(request):
    return compile_cuda(SOURCE, request.param)


def f32(n: int) -> np.ndarray:
    return np.arange(n, dtype="f4")


def zeros(n: int) -> np.ndarray:
    return np.zeros(n, "f4")


def make(name: str) -> tuple:
    """Grid, block and arguments of a planted kernel."""
    return {
        "past_end": (2, 128, f32(200), zeros(200), 200),
        "misaligned": (1, 32, f32(132), zeros(128)),
        "shared_past_end": (1, 64, zeros(64)),
        "uninitialized": (1, 64, zeros(64)),
        "read_after_write": (2, 128, f32(128), zeros(128)),
        "write_after_read": (1, 128, f32(128), zeros(128)),
        "write_after_write": (1, 128, zeros(128)),
        "same_instruction": (1, 128, zeros(128)),
        "warp_exchange": (1, 128, f32(128), zeros(128)),
        "async_copy": (1, 128, f32(512), zeros(512)),
        "async_copy_no_barrier": (1, 128, f32(512), zeros(512)),
        "ring": (1, 64, f32(1024), zeros(256)),
        "cta_writes": (4, 32, zeros(4)),
        "cta_reads": (4, 32, zeros(128)),
        "cta_write_after_read": (8, 32, f32(4), zeros(288)),
        "last_block": (8, 32, f32(8), zeros(8), np.zeros(1, "u4"), zeros(1)),
        "noncoherent": (1, 32, zeros(64)),
        "divergent": (1, 128, zeros(128)),
        "some_never_arrive": (1, 128, zeros(128)),
        "counts_differ": (1, 128, zeros(128)),
        "half_a_warp": (1, 64, zeros(64)),
        "endless": (1, 32, zeros(32)),
        "asserts": (1, 128, zeros(128)),
        "traps": (1, 128, zeros(128)),
        "big_local": (1, 32, zeros(32)),
    }[name]


PLANTED = {
    "past_end": (errors.OutOfBounds, "0 bytes past the end of arg"),
    "misaligned": (errors.Misaligned, "16 bytes"),
    "shared_past_end": (errors.OutOfBounds, "offset 256"),
    "uninitialized": (errors.UninitializedShared, "uninitialised"),
    "read_after_write": (errors.SharedRace, "read of bytes that thread"),
    "write_after_read": (errors.SharedRace, "write of bytes that thread"),
    "write_after_write": (errors.SharedRace, "wrote"),
    "same_instruction": (errors.SharedRace, "different values"),
    "warp_exchange": (errors.SharedRace, "read of bytes"),
    "async_copy": (errors.SharedRace, "cp.async nothing waited for"),
    "async_copy_no_barrier": (errors.SharedRace, "read of bytes"),
    "ring": (errors.SharedRace, "write of bytes that thread"),
    "cta_writes": (errors.GlobalRace, "CTA"),
    "cta_reads": (errors.GlobalRace, "CTA"),
    "cta_write_after_read": (errors.GlobalRace, "read by"),
    "last_block": (errors.GlobalRace, "read of bytes written by CTA"),
    "noncoherent": (errors.GlobalRace, "non-coherent"),
    "divergent": (errors.BarrierError, "one warp wait at line"),
    "some_never_arrive": (errors.BarrierError, "of 96 arrived"),
    "counts_differ": (errors.BarrierError, "different thread counts"),
    "half_a_warp": (errors.BarrierError, "never reach"),
    "endless": (errors.StepLimit, "steps"),
    "asserts": (errors.LaunchError, "assertion failed: threadIdx.x + bug < 128"),
    "traps": (errors.LaunchError, "trap"),
    "big_local": (errors.OutOfBounds, "local"),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_planted_bug(kernels, name: str, seed: int | None) -> None:
    grid, block, *args = make(name)
    clean = run(kernels, name, grid, block, *args, 0, seed=seed)
    assert clean.thread_instructions > 0
    kind, text = PLANTED[name]
    grid, block, *args = make(name)
    bug = 1000 if name == "big_local" else 1
    # Under another schedule a racing read may come before the write.
    kinds = (kind, errors.UninitializedShared) if seed and kind is errors.SharedRace else kind
    with pytest.raises(kinds) as caught:
        run(kernels, name, grid, block, *args, bug, seed=seed, max_steps=20_000)
    if seed is None:
        assert text in str(caught.value)
    assert caught.value.where["kernel"]
    assert "line" in caught.value.where["ptx"]
    assert ".cu:" in caught.value.where["source"]


def test_error_names_block_thread_and_address(kernels) -> None:
    x, y = f32(200), zeros(200)
    with pytest.raises(errors.OutOfBounds) as caught:
        run(kernels, "past_end", 2, 128, x, y, 200, 1)
    where = caught.value.where
    assert where["block"] == (1, 0, 0) and where["thread"] == (72, 0, 0)
    assert int(where["address"], 16) == x.ctypes.data + 800


def test_read_only_buffer(kernels) -> None:
    y = zeros(4)
    y.flags.writeable = False
    with pytest.raises(errors.OutOfBounds, match="read-only"):
        run(kernels, "cta_writes", 4, 32, y, 0)


def test_checks_can_be_switched_off(kernels) -> None:
    run(kernels, "read_after_write", 1, 128, f32(128), zeros(128), 1, checks=Checks(races=False))
    run(kernels, "cta_writes", 4, 32, zeros(4), 1, checks=Checks(global_races=False))
    run(kernels, "warp_exchange", 1, 128, f32(128), zeros(128), 1, checks=Checks(warp_races=False))
    with pytest.raises(errors.SharedRace):
        args = (f32(128), zeros(128), 1)
        run(kernels, "read_after_write", 1, 128, *args, checks=Checks(warp_races=False))
    off = Checks(uninitialized=False)  # the kernel masks these rows later
    run(kernels, "uninitialized", 1, 64, zeros(64), 1, checks=off)


def test_launch_limits(kernels) -> None:
    with pytest.raises(errors.LaunchError, match="1056 threads"):
        run(kernels, "endless", 1, 1056, zeros(32), 0)
    with pytest.raises(errors.LaunchError, match="shared memory"):
        run(kernels, "endless", 1, 32, zeros(32), 0, dynamic_smem=170 * 1024, device=A100)
    with pytest.raises(errors.LaunchError, match="zero"):
        run(kernels, "endless", (1, 0), 32, zeros(32), 0)


def test_unknown_instruction_only_when_reached() -> None:
    body = """
    .reg .pred %q; .reg .b32 %x;
    ld.global.u32 %x, [%p0]; setp.eq.u32 %q, %x, 0; @%q bra DONE;
    cp.async.bulk.commit_group;
    DONE:
    """
    module = ptx_kernel(body, 1)
    run(module, "k", 1, 32, np.zeros(1, "u4"))
    with pytest.raises(errors.UnknownInstruction) as caught:
        run(module, "k", 1, 32, np.ones(1, "u4"))
    assert "cp.async.bulk" in caught.value.where["ptx"]


def test_null_pointer_and_unregistered_address(kernels) -> None:
    with pytest.raises(errors.OutOfBounds):
        run(kernels, "past_end", 1, 32, 0, zeros(32), 32, 0)


def test_arrivals_beyond_the_count_open_the_next_generation() -> None:
    """Six warps reach a barrier for two: three generations."""
    report = run(ptx_kernel("bar.sync 1, 64;", 1), "k", 1, 192, zeros(1))
    assert report.barriers == 3
    with pytest.raises(errors.BarrierError, match="deadlock"):
        run(ptx_kernel("bar.sync 1, 64;", 1), "k", 1, 160, zeros(1))


def test_mbarrier_producer_consumer() -> None:
    """One warp fills a ring that another reads, ordered by full and empty mbarriers."""
    source = r"""
    #include <cstdint>
    __device__ inline uint32_t sptr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
    __device__ inline void wait(uint64_t* b, int phase) {
      asm volatile("{\n.reg .pred p;\nLAB_WAIT:\n"
                   "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                   "@p bra DONE;\nbra LAB_WAIT;\nDONE:\n}" ::"r"(sptr(b)), "r"(phase) : "memory");
    }
    __device__ inline void arrive(uint64_t* b) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sptr(b)) : "memory");
    }
    __global__ void ring(const float* x, float* y, int n, int bug) {
      __shared__ float s[2][32];
      __shared__ uint64_t full[2], empty[2];
      if (threadIdx.x == 0)
        for (int i = 0; i < 2; i++) {
          asm volatile("mbarrier.init.shared::cta.b64 [%0], 32;" ::"r"(sptr(&full[i])));
          asm volatile("mbarrier.init.shared::cta.b64 [%0], 32;" ::"r"(sptr(&empty[i])));
        }
      __syncthreads();
      int lane = threadIdx.x & 31;
      if (threadIdx.x < 32) {
        for (int k = 0; k < n; k++) {
          if (!(bug & 1)) wait(&empty[k & 1], ((k >> 1) & 1) ^ 1);
          s[k & 1][lane] = x[k * 32 + lane];
          arrive(&full[k & 1]);
        }
      } else {
        for (int k = 0; k < n; k++) {
          if (!(bug & 2)) wait(&full[k & 1], (k >> 1) & 1);
          y[k * 32 + lane] = 2 * s[k & 1][31 - lane];
          arrive(&empty[k & 1]);
        }
      }
    }
    """
    module = compile_cuda(source)
    n = 7
    x = f32(32 * n)
    for seed in (None, 1, 2, 3):
        y = zeros(32 * n)
        run(module, "ring", 1, 64, x, y, n, 0, seed=seed)
        np.testing.assert_array_equal(y.reshape(n, 32), 2 * x.reshape(n, 32)[:, ::-1])
    for bug in (1, 2):
        with pytest.raises((errors.SharedRace, errors.UninitializedShared, errors.BarrierError)):
            run(module, "ring", 1, 64, x, zeros(32 * n), n, bug)

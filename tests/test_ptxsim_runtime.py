"""The simulator's CUDA runtime: launches, limits, memory and devices, seen from host code."""

import numpy as np
import pytest
import torch
from ptxsim import errors, runtime
from ptxsim.harness import nvcc

pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc is missing")

INVALID_VALUE, INVALID_CONFIGURATION, INVALID_SYMBOL = 1, 9, 13
INVALID_DEVICE, NO_KERNEL_IMAGE = 101, 209
OUT_OF_RESOURCES, LAUNCH_FAILURE, COOPERATIVE_TOO_LARGE = 701, 719, 720

SOURCE = r"""
#include <cuda_runtime.h>
#include <cstdint>
#include <cstring>

#define API extern "C" __attribute__((visibility("default")))

struct Mixed { float a[3]; char b; double c; };

__global__ void mixed(char x, const Mixed m, int64_t y, double* out, short z) {
  out[0] = x; out[1] = m.a[2]; out[2] = m.b; out[3] = m.c; out[4] = double(y); out[5] = z;
}
API int run_mixed(double* out) {
  Mixed m{{1.f, 2.f, 3.5f}, -7, 1e100};
  mixed<<<1, 1>>>(-3, m, int64_t{1} << 40, out, -300);
  return cudaGetLastError();
}

__global__ void arch(int* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}
API int run_arch(int* out) { arch<<<1, 1>>>(out); return cudaGetLastError(); }

__global__ void increment(int* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] += 1;
}
API int run_increment(int* x, int n, unsigned gx, unsigned gy, unsigned bx, unsigned bz) {
  increment<<<dim3(gx, gy), dim3(bx, 1, bz)>>>(x, n);
  return cudaGetLastError();
}
API int run_increment_unchecked(int* x, int n) { increment<<<1, 32>>>(x, n); return 0; }

__global__ void __launch_bounds__(64) bounded(int* x) { x[threadIdx.x] = 1; }
API int run_bounded(int* x, int threads) { bounded<<<1, threads>>>(x); return cudaGetLastError(); }

__global__ void dynamic(int* out) {
  extern __shared__ int s[];
  __shared__ int t[256];
  t[threadIdx.x] = s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = s[31 - threadIdx.x] + t[threadIdx.x];
}
API int run_dynamic(int* out, int bytes, int opt_in) {
  if (opt_in >= 0) {
    if (int error = cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         opt_in)) {
      cudaGetLastError();
      return 1000 + error;
    }
  }
  dynamic<<<1, 32, bytes>>>(out);
  return cudaGetLastError();
}
API int attributes(int* out) {
  cudaFuncAttributes a;
  const int error = cudaFuncGetAttributes(&a, dynamic);
  out[0] = a.sharedSizeBytes;
  out[1] = a.maxThreadsPerBlock;
  cudaFuncGetAttributes(&a, bounded);
  out[2] = a.maxThreadsPerBlock;
  return error;
}
API int occupancy(int* out, int threads, int bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(out, dynamic, threads, bytes);
}

API int run_extended(int* x, int n, int grid, int cooperative) {
  cudaStream_t stream;
  cudaEvent_t start, end;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaEventCreate(&start);
  cudaEventCreateWithFlags(&end, cudaEventDisableTiming);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = 1024;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = cooperative;
  config.attrs = attributes;
  config.numAttrs = 2;
  cudaEventRecord(start, stream);
  const int error = cudaLaunchKernelEx(&config, increment, x, n);
  cudaEventRecord(end, stream);
  cudaStreamWaitEvent(stream, end, 0);
  float ms = -1;
  cudaEventElapsedTime(&ms, start, end);
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  const int sync = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  return error ? error : sync ? sync : ms < 0;
}

API int round_trip(const int* in, int* out, int n) {
  void *a, *b;
  cudaMalloc(&a, n * sizeof(int));
  cudaMallocAsync(&b, n * sizeof(int), 0);
  cudaMemcpy(a, in, n * sizeof(int), cudaMemcpyHostToDevice);
  cudaMemsetAsync(b, 255, n * sizeof(int), 0);
  cudaMemcpyAsync(b, a, n / 2 * sizeof(int), cudaMemcpyDeviceToDevice, 0);
  increment<<<(n + 31) / 32, 32>>>(static_cast<int*>(b), n);
  cudaMemcpy(out, b, n * sizeof(int), cudaMemcpyDeviceToHost);
  const int first = cudaFree(a), second = cudaFreeAsync(b, 0), twice = cudaFree(a);
  return first | second << 8 | twice << 16 | int(cudaGetLastError()) << 24;
}
API int after_free(int n) {
  void* a;
  cudaMalloc(&a, n * sizeof(int));
  cudaFree(a);
  increment<<<1, 32>>>(static_cast<int*>(a), n);
  return cudaGetLastError();
}

__constant__ float table[4];
__device__ int hits = 5;
__global__ void lookup(float* out) {
  out[threadIdx.x] = table[threadIdx.x & 3];
  atomicAdd(&hits, 1);
}
API int symbols(const float* values, float* out, int* count) {
  if (int error = cudaMemcpyToSymbol(table, values, 8, 8)) return error;
  if (int error = cudaMemcpyToSymbol(table, values + 2, 8)) return error;
  lookup<<<1, 8>>>(out);
  if (int error = cudaGetLastError()) return error;
  void* p;
  size_t size;
  cudaGetSymbolAddress(&p, hits);
  cudaGetSymbolSize(&size, table);
  if (size != sizeof(table) || cudaMemcpyToSymbol(table, values, 16, 4) != cudaErrorInvalidSymbol) {
    return -1;
  }
  cudaGetLastError();
  std::memcpy(count, p, sizeof(int));
  const int zero = 100;
  cudaMemcpyToSymbol(hits, &zero, sizeof(int));
  return cudaMemcpyFromSymbol(count + 1, hits, sizeof(int));
}

API int query(int* out) {
  int device;
  cudaGetDevice(&device);
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  cudaDeviceGetAttribute(out, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(out + 1, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(out + 2, cudaDevAttrComputeCapabilityMajor, device);
  out[3] = p.multiProcessorCount;
  out[4] = int(p.sharedMemPerBlockOptin);
  out[5] = p.major * 10 + p.minor;
  cudaGetDeviceCount(out + 6);
  out[7] = cudaSetDevice(99);
  out[8] = std::strcmp(cudaGetErrorName(cudaGetLastError()), "cudaErrorInvalidDevice");
  out[9] = cudaPeekAtLastError();
  out[10] = int(p.sharedMemPerBlock);
  return 0;
}
"""


@pytest.fixture(scope="module")
def lib():
    return runtime.compile(SOURCE, archs=("80", "90a"))


def test_parameters_are_laid_out_as_the_kernel_reads_them(lib):
    out = np.zeros(6)
    assert lib.call("run_mixed", out=out) == 0
    assert out.tolist() == [-3, 3.5, -7, 1e100, 2**40, -300]


@pytest.mark.parametrize("device,expected", [("h100", 900), ("a100", 800)])
def test_each_device_runs_its_own_ptx(lib, device, expected):
    out = np.zeros(1, np.int32)
    with runtime.use_device(device):
        assert lib.call("run_arch", out=out) == 0
    assert out[0] == expected


def test_code_for_another_architecture_is_refused():
    source = r"""
    __global__ void k(int* x) { *x = 1; }
    extern "C" int run(int* x) { k<<<1, 1>>>(x); return cudaGetLastError(); }
    """
    lib, x = runtime.compile(source), np.zeros(1, np.int32)
    with runtime.use_device("a100"):
        assert lib.call("run", x=x) == NO_KERNEL_IMAGE
    assert lib.call("run", x=x) == 0 and x[0] == 1


@pytest.mark.parametrize(
    "grid,block,expected",
    [
        ((1, 1), (32, 1), 0),
        ((0, 1), (32, 1), INVALID_CONFIGURATION),
        ((1, 65536), (32, 1), INVALID_CONFIGURATION),
        ((2**31, 1), (32, 1), INVALID_CONFIGURATION),
        ((1, 1), (0, 1), INVALID_CONFIGURATION),
        ((1, 1), (1025, 1), INVALID_CONFIGURATION),
        ((1, 1), (1, 65), INVALID_CONFIGURATION),
        ((1, 1), (512, 4), INVALID_CONFIGURATION),
    ],
)
def test_launch_limits(lib, grid, block, expected):
    x = np.zeros(32, np.int32)
    arguments = dict(x=x, n=32, gx=grid[0], gy=grid[1], bx=block[0], bz=block[1])
    assert lib.call("run_increment", **arguments) == expected
    assert x.tolist() == [int(expected == 0)] * 32


def test_launch_bounds_are_a_limit(lib):
    x = np.zeros(128, np.int32)
    assert lib.call("run_bounded", x=x, threads=64) == 0
    assert lib.call("run_bounded", x=x, threads=65) == OUT_OF_RESOURCES


@pytest.mark.parametrize("device,optin", [("h100", 227), ("a100", 163)])
def test_shared_memory_limits(lib, device, optin):
    out = np.zeros(32, np.int32)

    def run(size, opt_in=-1):
        return lib.call("run_dynamic", out=out, bytes=size, opt_in=opt_in)

    static = 1024
    with runtime.use_device(device):
        assert run(48 * 1024 - static) == 0
        assert out.tolist() == [31] * 32
        assert run(48 * 1024) == INVALID_VALUE
        assert run(128, optin * 1024 - static + 1) == 1000 + INVALID_VALUE
        assert run(optin * 1024 - static, optin * 1024 - static) == 0
        assert run(100_001, 100_000) == INVALID_VALUE
        run(128, 0)  # leave no opt-in behind


def test_opting_in_holds_for_one_device(lib):
    out = np.zeros(32, np.int32)
    assert lib.call("run_dynamic", out=out, bytes=100_000, opt_in=100_000) == 0
    with runtime.use_device("a100"):
        assert lib.call("run_dynamic", out=out, bytes=100_000, opt_in=-1) == INVALID_VALUE
    lib.call("run_dynamic", out=out, bytes=128, opt_in=0)


def test_attributes_and_occupancy(lib):
    out = np.zeros(3, np.int32)
    assert lib.call("attributes", out=out) == 0
    assert out.tolist() == [1024, 1024, 64]
    # Threads, blocks, shared memory: (1 KiB static + 1 KiB reserved + dynamic) per block.
    for threads, smem, expected in [(256, 0, 8), (32, 0, 32), (128, 40_000, 5), (1024, 49_000, 0)]:
        assert lib.call("occupancy", out=out, threads=threads, bytes=smem) == 0
        assert out[0] == expected


def test_launch_attributes_streams_and_events(lib):
    x = np.zeros(2000, np.int32)
    assert lib.call("run_extended", x=x, n=2000, grid=2, cooperative=0) == 0
    assert (x == 1).all()
    assert lib.call("run_extended", x=x, n=2000, grid=2, cooperative=1) == 0
    assert (x == 2).all()
    # 2048 threads fit an SM, so 264 CTAs of 1024 are resident on an H100 at once.
    too_large = lib.call("run_extended", x=x, n=2000, grid=265, cooperative=1)
    assert too_large == COOPERATIVE_TOO_LARGE
    assert (x == 2).all()


def test_device_memory(lib):
    x, out = np.arange(100, dtype=np.int32), np.zeros(100, np.int32)
    result = lib.call("round_trip", **{"in": x}, out=out, n=100)
    assert result == INVALID_VALUE << 16 | INVALID_VALUE << 24
    assert out.tolist() == [*range(1, 51), *[0] * 50]
    with pytest.raises(errors.OutOfBounds):
        lib.call("after_free", n=16)


def test_symbols(lib):
    values, out = np.array([3, 4, 1, 2], np.float32), np.zeros(8, np.float32)
    count = np.zeros(2, np.int32)
    assert lib.call("symbols", values=values, out=out, count=count) == 0
    assert out.tolist() == [1, 2, 3, 4] * 2
    assert count.tolist() == [13, 100]


@pytest.mark.parametrize("device,sms,smem,arch", [("h100", 132, 227, 90), ("a100", 108, 163, 80)])
def test_device_queries(lib, device, sms, smem, arch):
    out = np.zeros(11, np.int32)
    with runtime.use_device(device):
        lib.call("query", out=out)
    expected = [sms, smem * 1024, arch // 10, sms, smem * 1024, arch]
    assert out.tolist() == [*expected, 2, INVALID_DEVICE, 0, 0, 48 * 1024]


@pytest.mark.parametrize("function", ["run_increment", "run_increment_unchecked"])
def test_simulator_errors_reach_the_caller(lib, function):
    x = np.zeros(32, np.int32)
    launch = dict(gx=1, gy=1, bx=32, bz=1) if function == "run_increment" else {}
    with pytest.raises(errors.OutOfBounds, match="increment"):
        lib.call(function, x=x[:16], n=32, **launch)
    assert lib.call(function, x=x, n=32, **launch) == 0  # nothing stays behind


def test_buffers_end_with_the_call_and_may_be_read_only(lib):
    x = np.zeros(32, np.int32)
    assert lib.call("run_increment_unchecked", x=x, n=32) == 0
    with pytest.raises(errors.OutOfBounds):
        lib.call("run_increment_unchecked", x=x.ctypes.data, n=32)
    x.flags.writeable = False
    with pytest.raises(errors.OutOfBounds):
        lib.call("run_increment_unchecked", x=x, n=32)


def test_record_nests(lib):
    x = np.zeros(32, np.int32)
    with runtime.record() as outer:
        lib.call("run_increment_unchecked", x=x, n=32)
        with runtime.record("a100", seed=3) as inner:
            lib.call("run_increment_unchecked", x=x, n=20)
    lib.call("run_increment_unchecked", x=x, n=32)
    assert [r.loaded_bytes("x") for r in outer] == [128, 80]
    assert [r.stored_bytes("x") for r in inner] == [80]
    assert outer[0].grid == (1, 1, 1) and outer[0].block == (32, 1, 1)


@pytest.fixture(scope="module")  # a test's own time limit should not see the build
def ops():
    return runtime.load_ops()


def test_operators_run_their_bindings_and_launchers(ops):
    seeds, positions = torch.arange(3), torch.arange(3) + 10
    with runtime.record() as launches:
        out = ops.philox_uniform(seeds, positions, 0, 1, 1001)
    (report,) = launches
    assert "philox_uniform_kernel" in report.kernel
    assert report.stored_bytes("out") == out.nbytes
    assert report.unique_bytes("seeds") == seeds.nbytes
    with runtime.record() as launches:
        with pytest.raises(RuntimeError, match="row must be in"):
            ops.philox_uniform(seeds, positions, -1, 1, 4)
        assert ops.philox_uniform(seeds[:0], positions[:0], 0, 1, 4).shape == (0, 4)
    assert launches == []


def test_operators_see_only_what_data_ptr_announced(ops, monkeypatch):
    monkeypatch.setattr(runtime, "_register", lambda *a: None)
    with pytest.raises(errors.OutOfBounds):
        ops.philox_uniform(torch.arange(3), torch.arange(3), 0, 1, 4)

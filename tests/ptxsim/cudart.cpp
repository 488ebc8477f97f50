// A CUDA runtime without a device: the cudart functions that nvcc's host code and our launchers
// call, with one address space for host and device. Allocation and copies are immediate host
// operations, streams and events are tokens, and launches go to Python (runtime.py), which set
// its callbacks before any CUDA code was loaded. Limits are refused with the errors of hardware.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

// The three structures that cross to Python; runtime.py declares them again, in this order.
struct Limits {
  char name[64];
  int arch;  // 90 for sm_90
  int sm_count;
  int smem_per_block;
  int smem_per_block_optin;
  int smem_per_sm;
  int threads_per_block;
  int threads_per_sm;
  int regs_per_sm;
};

struct KernelInfo {
  int static_smem;
  int max_threads;  // from __launch_bounds__, else the device's limit
};

struct Launch {
  const void* fatbin;
  const char* kernel;
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t cluster[3];
  uint64_t dynamic_smem;
  void** args;
};

struct Callbacks {
  int (*describe)(const void* fatbin, const char* kernel, KernelInfo* info);
  int (*launch)(const Launch* launch);
  void (*memory)(const void* address, uint64_t bytes, const char* name);  // bytes 0: freed
  void* (*symbol)(const void* fatbin, const char* name);
};

struct Kernel {
  const void* fatbin;
  std::string name;
  std::map<int, int> dynamic_smem;  // opted in with cudaFuncSetAttribute, per device ordinal
};

struct Variable {
  const void* fatbin;
  std::string name;
  size_t size;
};

struct Module {
  const void* fatbin;
};

struct CallConfiguration {
  dim3 grid, block;
  size_t smem;
  cudaStream_t stream;
};

constexpr int kReservedSmem = 1024;  // per CTA, taken by the system
constexpr int kBlocksPerSm = 32;

// Leaked on purpose: fatbins unregister themselves in exit handlers.
auto& devices = *new std::vector<Limits>;
auto& kernels = *new std::map<const void*, Kernel>;
auto& variables = *new std::map<const void*, Variable>;
auto& allocations = *new std::map<void*, size_t>;
auto& configurations = *new std::vector<CallConfiguration>;
Callbacks callbacks{};
int current_device = 0;
cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

const Limits& device() { return devices[current_device]; }

Kernel* find_kernel(const void* function) {
  const auto found = kernels.find(function);
  return found == kernels.end() ? nullptr : &found->second;
}

int smem_limit(const Kernel& kernel, const KernelInfo& info) {
  const auto opted = kernel.dynamic_smem.find(current_device);
  return std::max(device().smem_per_block - info.static_smem,
                  opted == kernel.dynamic_smem.end() ? 0 : opted->second);
}

// Registers are unknown before ptxas, so they do not limit this.
int blocks_per_sm(const KernelInfo& info, int threads, size_t dynamic_smem) {
  const int warps = (threads + 31) / 32;
  int blocks = std::min(kBlocksPerSm, device().threads_per_sm / std::max(32, warps * 32));
  const int64_t smem =
      (info.static_smem + static_cast<int64_t>(dynamic_smem) + kReservedSmem + 127) / 128 * 128;
  return std::min<int64_t>(blocks, device().smem_per_sm / smem);
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** args, size_t smem,
                   dim3 cluster, bool cooperative) {
  Kernel* kernel = find_kernel(function);
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  KernelInfo info{};
  if (const int error = callbacks.describe(kernel->fatbin, kernel->name.c_str(), &info)) {
    return fail(static_cast<cudaError_t>(error));
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      threads > static_cast<uint64_t>(device().threads_per_block)) {
    return fail(cudaErrorInvalidConfiguration);
  }
  if (threads > static_cast<uint64_t>(info.max_threads)) return fail(cudaErrorLaunchOutOfResources);
  if (smem > static_cast<size_t>(std::max(0, smem_limit(*kernel, info)))) {
    return fail(cudaErrorInvalidValue);
  }
  if (cluster.x == 0 || cluster.y == 0 || cluster.z == 0 || grid.x % cluster.x ||
      grid.y % cluster.y || grid.z % cluster.z) {
    return fail(cudaErrorInvalidClusterSize);
  }
  if (cooperative && uint64_t{grid.x} * grid.y * grid.z >
                         static_cast<uint64_t>(device().sm_count) *
                             blocks_per_sm(info, static_cast<int>(threads), smem)) {
    return fail(cudaErrorCooperativeLaunchTooLarge);
  }
  const Launch request{kernel->fatbin,
                       kernel->name.c_str(),
                       {grid.x, grid.y, grid.z},
                       {block.x, block.y, block.z},
                       {cluster.x, cluster.y, cluster.z},
                       smem,
                       args};
  return fail(static_cast<cudaError_t>(callbacks.launch(&request)));
}

void* allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 256, bytes ? bytes : 1)) return nullptr;
  allocations[p] = bytes;
  callbacks.memory(p, bytes, "cudaMalloc");
  return p;
}

cudaError_t release(void* p) {
  if (!p) return cudaSuccess;
  if (!allocations.erase(p)) return fail(cudaErrorInvalidValue);
  callbacks.memory(p, 0, nullptr);
  free(p);
  return cudaSuccess;
}

char* symbol_address(const void* symbol, size_t end) {
  const auto found = variables.find(symbol);
  if (found == variables.end() || end > found->second.size) return nullptr;
  return static_cast<char*>(callbacks.symbol(found->second.fatbin, found->second.name.c_str()));
}

}  // namespace

extern "C" {

// The interface to Python.
void ptxsim_set_callbacks(const Callbacks* given) { callbacks = *given; }
int ptxsim_add_device(const Limits* limits) {
  devices.push_back(*limits);
  return static_cast<int>(devices.size()) - 1;
}

// The interface to the test-only build of the bindings (csrc/torch/common.h).
void ptxsim_register_buffer(const void* address, size_t bytes, const char* name) {
  callbacks.memory(address, bytes, name);
}

// What nvcc's host code calls.
void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* data;
    void* unused;
  };
  return reinterpret_cast<void**>(new Module{static_cast<Wrapper*>(wrapper)->data});
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernels[host] = {reinterpret_cast<Module*>(module)->fatbin, name, {}};
}
void __cudaRegisterVar(void** module, char* host, char*, const char* name, int, size_t size, int,
                       int) {
  variables[host] = {reinterpret_cast<Module*>(module)->fatbin, name, size};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t smem, cudaStream_t stream) {
  configurations.push_back({grid, block, smem, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* smem, void* stream) {
  if (configurations.empty()) return fail(cudaErrorMissingConfiguration);
  const CallConfiguration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid;
  *block = top.block;
  *smem = top.smem;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t smem,
                               cudaStream_t) {
  return launch(kernel, grid, block, args, smem, dim3(1, 1, 1), false);
}

// Launches.
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args, size_t smem,
                             cudaStream_t) {
  return launch(function, grid, block, args, smem, dim3(1, 1, 1), false);
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** args,
                                        size_t smem, cudaStream_t) {
  return launch(function, grid, block, args, smem, dim3(1, 1, 1), true);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** args) {
  dim3 cluster(1, 1, 1);
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension) {
      cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
    } else if (a.id == cudaLaunchAttributeCooperative) {
      cooperative = a.val.cooperative;
    }
  }
  return launch(function, config->gridDim, config->blockDim, args, config->dynamicSmemBytes,
                cluster, cooperative);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}

// Kernel attributes and occupancy.
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  Kernel* kernel = find_kernel(function);
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  KernelInfo info{};
  if (const int error = callbacks.describe(kernel->fatbin, kernel->name.c_str(), &info)) {
    return fail(static_cast<cudaError_t>(error));
  }
  if (value < 0 || value + info.static_smem > device().smem_per_block_optin) {
    return fail(cudaErrorInvalidValue);
  }
  kernel->dynamic_smem[current_device] = value;
  return cudaSuccess;
}
cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  Kernel* kernel = find_kernel(function);
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  KernelInfo info{};
  if (const int error = callbacks.describe(kernel->fatbin, kernel->name.c_str(), &info)) {
    return fail(static_cast<cudaError_t>(error));
  }
  *attributes = {};
  attributes->sharedSizeBytes = info.static_smem;
  attributes->maxThreadsPerBlock = info.max_threads;
  attributes->maxDynamicSharedSizeBytes = smem_limit(*kernel, info);
  attributes->ptxVersion = attributes->binaryVersion = device().arch;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int threads, size_t smem,
                                                                   unsigned) {
  Kernel* kernel = find_kernel(function);
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  KernelInfo info{};
  if (const int error = callbacks.describe(kernel->fatbin, kernel->name.c_str(), &info)) {
    return fail(static_cast<cudaError_t>(error));
  }
  *blocks = threads > info.max_threads || smem > static_cast<size_t>(smem_limit(*kernel, info))
                ? 0
                : blocks_per_sm(info, threads, smem);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t smem) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, smem, 0);
}

// Errors.
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

#define MTP_ERRORS(X)                                                                            \
  X(cudaSuccess, "no error")                                                                     \
  X(cudaErrorInvalidValue, "invalid argument")                                                   \
  X(cudaErrorMemoryAllocation, "out of memory")                                                  \
  X(cudaErrorInvalidConfiguration, "invalid configuration argument")                             \
  X(cudaErrorMissingConfiguration, "__global__ function call is not configured")                 \
  X(cudaErrorInvalidDeviceFunction, "invalid device function")                                   \
  X(cudaErrorInvalidDevice, "invalid device ordinal")                                            \
  X(cudaErrorInvalidSymbol, "invalid device symbol")                                             \
  X(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device") \
  X(cudaErrorLaunchOutOfResources, "too many resources requested for launch")                    \
  X(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch")                 \
  X(cudaErrorInvalidClusterSize, "cluster misconfiguration")                                     \
  X(cudaErrorLaunchFailure, "unspecified launch failure")                                        \
  X(cudaErrorNotSupported, "operation not supported")

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define X(name, text) \
  case name:          \
    return #name;
    MTP_ERRORS(X)
#undef X
    default:
      return "unrecognized error code";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
#define X(name, text) \
  case name:          \
    return text;
    MTP_ERRORS(X)
#undef X
    default:
      return "unrecognized error code";
  }
}

// Devices.
cudaError_t cudaGetDeviceCount(int* count) {
  *count = static_cast<int>(devices.size());
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* ordinal) {
  *ordinal = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int ordinal) {
  if (ordinal < 0 || ordinal >= static_cast<int>(devices.size())) {
    return fail(cudaErrorInvalidDevice);
  }
  current_device = ordinal;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  if (ordinal < 0 || ordinal >= static_cast<int>(devices.size())) {
    return fail(cudaErrorInvalidDevice);
  }
  const Limits& d = devices[ordinal];
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = d.threads_per_block;
      break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *value = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *value = 64;
      break;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *value = 65535;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = d.smem_per_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.smem_per_block_optin;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = d.smem_per_sm;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kReservedSmem;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = d.regs_per_sm;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = d.sm_count;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = d.threads_per_sm;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = kBlocksPerSm;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.arch / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.arch % 10;
      break;
    case cudaDevAttrL2CacheSize:
      *value = d.arch >= 90 ? 50 << 20 : 40 << 20;
      break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrMemoryPoolsSupported:
      *value = 1;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int ordinal) {
  if (ordinal < 0 || ordinal >= static_cast<int>(devices.size())) {
    return fail(cudaErrorInvalidDevice);
  }
  const Limits& d = devices[ordinal];
  *p = {};
  std::strncpy(p->name, d.name, sizeof(p->name) - 1);
  p->major = d.arch / 10;
  p->minor = d.arch % 10;
  p->multiProcessorCount = d.sm_count;
  p->sharedMemPerBlock = d.smem_per_block;
  p->sharedMemPerBlockOptin = d.smem_per_block_optin;
  p->sharedMemPerMultiprocessor = d.smem_per_sm;
  p->reservedSharedMemPerBlock = kReservedSmem;
  p->regsPerBlock = p->regsPerMultiprocessor = d.regs_per_sm;
  p->warpSize = 32;
  p->maxThreadsPerBlock = d.threads_per_block;
  p->maxThreadsPerMultiProcessor = d.threads_per_sm;
  p->maxBlocksPerMultiProcessor = kBlocksPerSm;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  cudaDeviceGetAttribute(&p->l2CacheSize, cudaDevAttrL2CacheSize, ordinal);
  p->totalGlobalMem = size_t{80} << 30;
  p->unifiedAddressing = p->cooperativeLaunch = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// Memory.
cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = allocate(bytes);
  return *p ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }
cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaMalloc(p, bytes); }
cudaError_t cudaFree(void* p) { return release(p); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return release(p); }
cudaError_t cudaFreeHost(void* p) { return release(p); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t y = 0; y < height; ++y) {
    std::memmove(static_cast<char*>(to) + y * to_pitch,
                 static_cast<const char*>(from) + y * from_pitch, width);
  }
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(p, value, bytes);
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *free_bytes = *total = size_t{80} << 30;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** p, const void* symbol) {
  *p = symbol_address(symbol, 0);
  return *p ? cudaSuccess : fail(cudaErrorInvalidSymbol);
}
cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  const auto found = variables.find(symbol);
  if (found == variables.end()) return fail(cudaErrorInvalidSymbol);
  *bytes = found->second.size;
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               cudaMemcpyKind kind) {
  char* p = symbol_address(symbol, offset + bytes);
  return p ? cudaMemcpy(p + offset, from, bytes, kind) : fail(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes,
                                    size_t offset, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                 cudaMemcpyKind kind) {
  const char* p = symbol_address(symbol, offset + bytes);
  return p ? cudaMemcpy(to, p + offset, bytes, kind) : fail(cudaErrorInvalidSymbol);
}

// Streams and events: everything has finished when the call that started it returned.
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<char*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
using Clock = std::chrono::steady_clock;
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Clock::time_point(Clock::now()));
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Clock::time_point*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *reinterpret_cast<Clock::time_point*>(event) = Clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = std::chrono::duration<float, std::milli>(*reinterpret_cast<Clock::time_point*>(end) -
                                                 *reinterpret_cast<Clock::time_point*>(start))
            .count();
  return cudaSuccess;
}

}  // extern "C"

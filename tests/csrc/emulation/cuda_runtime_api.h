// The few names of the CUDA runtime that csrc/cuda uses, for the CPU: a GPU of compute capability 8.0 that is so small
// that a few tiles fill it.
#pragma once

#include <cstddef>
#include <functional>

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulation {

// Runs `thread` for every thread of every block; what went wrong is what cudaGetErrorString says next.
cudaError_t run(const cudaLaunchConfig_t& launch, const void* kernel, const std::function<void()>& thread);

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 8;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return emulation::run(
      *config, reinterpret_cast<const void*>(kernel), [&] { kernel(static_cast<Parameters>(arguments)...); });
}

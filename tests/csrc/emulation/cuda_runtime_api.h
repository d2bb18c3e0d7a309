// Declares the part of the CUDA runtime that csrc/cuda uses, for the emulator on the CPU. The emulated GPU has compute
// capability 8.0 or 9.0. By default it has only 2 multiprocessors, so a few tiles fill it. Files that use CuTe are
// compiled with EFFT_TOOLKIT and take the types from the CUDA toolkit. The enumerators that are defined here have the
// same values.
#pragma once

#include <cstddef>
#include <functional>

#ifdef EFFT_TOOLKIT
#include_next <cuda_runtime_api.h>
// instructions.h defines these words for the emulator.
#undef __global__
#undef __device__
#undef __host__
#undef __grid_constant__
#undef __align__
#else

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

extern "C" {
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
}

#endif

namespace emulation {

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes;
  unsigned cluster;  // number of blocks per cluster, which are adjacent in x
  bool dependent;    // whether the kernel may start before the previous kernel has ended
};

// Calls `thread` once for every thread of every block. After an error, cudaGetErrorString returns its description until
// the next launch.
cudaError_t run(const Launch& launch, const void* kernel, const std::function<void()>& thread);

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  emulation::Launch launch{config->gridDim, config->blockDim.x, config->dynamicSmemBytes, 1, false};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) launch.cluster = attribute.val.clusterDim.x;
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      launch.dependent = attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  const auto thread = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return emulation::run(launch, reinterpret_cast<const void*>(kernel), std::cref(thread));
}

// Launching, and what the choice of a launch depends on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace efft {

inline int64_t ceil_div(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

// Bytes of shared memory that a block of every GPU from sm_80 on can have.
constexpr size_t SHARED_EVERYWHERE = 99 * 1024;

// A kernel that something launches, and the shared memory that its blocks get. The list is complete once the library is
// loaded.
struct Kernel {
  const void* function;
  size_t shared;
  const Kernel* next;

  Kernel(const void* function, size_t shared) : function(function), shared(shared), next(first()) { first() = this; }
  static const Kernel*& first() {
    static const Kernel* one = nullptr;
    return one;
  }
};
template <auto KERNEL, size_t SHARED>
inline const Kernel listed{reinterpret_cast<const void*>(KERNEL), SHARED};

// How a kernel is launched.
struct LaunchShape {
  dim3 grid;
  int threads;
  unsigned cluster = 1;    // blocks of a cluster, which lie side by side along x
  bool dependent = false;  // the kernel starts before the one in front of it has ended, and waits for that itself
};

// Launches a kernel whose blocks have SHARED bytes of shared memory.
template <auto KERNEL, size_t SHARED = 0, size_t LIMIT = SHARED_EVERYWHERE, class... Arguments>
cudaError_t launch(const LaunchShape& shape, cudaStream_t stream, Arguments&&... arguments) {
  static_assert(SHARED <= LIMIT, "more shared memory than a block can have");
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (shape.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = listed<KERNEL, SHARED>.shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, KERNEL, std::forward<Arguments>(arguments)...);
}

template <auto KERNEL, size_t SHARED = 0, size_t LIMIT = SHARED_EVERYWHERE, class... Arguments>
cudaError_t launch(dim3 grid, int threads, cudaStream_t stream, Arguments&&... arguments) {
  return launch<KERNEL, SHARED, LIMIT>(LaunchShape{grid, threads}, stream, std::forward<Arguments>(arguments)...);
}

// Of the current GPU; 0 where it does not say, which a launch will then report.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

inline bool is_sm90() {
#ifdef EFFT_SM90  // everywhere except in an emulator that was built without CUTLASS
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
#else
  return false;
#endif
}

// Whether to use the second generation of kernels for compute capability 9.0. No device has run these kernels yet, so
// that EFFT_SM90_GENERATION=2 must ask for them.
inline bool is_second_generation() {
  static const char* const asked = std::getenv("EFFT_SM90_GENERATION");
  return asked && std::strcmp(asked, "2") == 0 && is_sm90();
}

}  // namespace efft

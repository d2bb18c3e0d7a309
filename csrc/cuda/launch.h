// Launching, and what the choice of a launch depends on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
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

// Blocks have SHARED bytes of shared memory, and come in clusters of CLUSTER that lie side by side along x.
template <auto KERNEL, size_t SHARED = 0, size_t LIMIT = SHARED_EVERYWHERE, unsigned CLUSTER = 1, class... Arguments>
cudaError_t launch(dim3 grid, int threads, cudaStream_t stream, Arguments&&... arguments) {
  static_assert(SHARED <= LIMIT, "more shared memory than a block can have");
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = CLUSTER;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = listed<KERNEL, SHARED>.shared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = CLUSTER > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, KERNEL, std::forward<Arguments>(arguments)...);
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

}  // namespace efft

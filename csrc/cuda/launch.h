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

// Blocks in clusters of CLUSTER, side by side along x.
template <size_t SHARED, size_t LIMIT = SHARED_EVERYWHERE, unsigned CLUSTER = 1, class... Parameters, class... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Arguments&&... arguments) {
  static_assert(SHARED <= LIMIT, "more shared memory than a block can have");
  constexpr size_t without_asking = 48 * 1024;
  if (SHARED > without_asking) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(SHARED));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = SHARED;
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = CLUSTER;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = CLUSTER > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
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

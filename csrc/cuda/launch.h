// Launches kernels, and queries the properties of the GPU on which the choice of a kernel depends.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <utility>

namespace efft {

inline int64_t ceil_div(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

// The bytes of shared memory that a block can have on every GPU of compute capability 8.0 or newer.
constexpr size_t SHARED_EVERYWHERE = 99 * 1024;

// An entry in the list of all kernels that this library can launch. `shared` is the dynamic shared memory of a block in
// bytes. The list is complete as soon as the library is loaded.
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

// The configuration of a launch.
struct LaunchShape {
  dim3 grid;
  int threads;
  unsigned cluster = 1;  // number of blocks per cluster, which are adjacent along x
  // Whether the kernel may start before the previous kernel of the stream has ended. Such a kernel calls
  // wait_for_kernel_in_front itself before it uses memory of other kernels.
  bool dependent = false;
};

// Launches a kernel whose blocks have SHARED bytes of dynamic shared memory. LIMIT is the largest size that a block can
// have on the GPUs that run this kernel.
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

// Returns an attribute of the current GPU. If the query fails, returns 0, and a later launch reports the error.
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
#ifdef EFFT_SM90  // defined except in an emulator that was built without CUTLASS
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
#else
  return false;
#endif
}

// Returns the generation of kernels that EFFT_SM90_GENERATION selects: 1 (also if the variable is unset), 2 or 3.
// Returns 0 if the variable has another value, for which the binding raises an error.
inline int requested_generation() {
  static const int requested = [] {
    const char* const value = std::getenv("EFFT_SM90_GENERATION");
    if (!value || !*value) return 1;
    const int number = value[0] - '0';
    return value[1] == '\0' && number >= 1 && number <= 3 ? number : 0;
  }();
  return requested;
}

// Returns the generation of kernels to use. The generations differ only on compute capability 9.0. The second and the
// third generation have not yet run on a GPU, and are therefore used only on request.
inline int generation() {
  return is_sm90() ? requested_generation() : 1;
}

}  // namespace efft

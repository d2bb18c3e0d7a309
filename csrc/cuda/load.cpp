// Loads all kernels. Otherwise CUDA would load each kernel at its first launch, and no kernel may be loaded while a
// graph is captured. A warm-up before the capture is not enough: if its shapes differ from those of the capture, it may
// launch other kernels.
#include <atomic>

#include "kernels.h"
#include "launch.h"

namespace efft {

cudaError_t load_kernels() {
  static std::atomic<uint64_t> loaded{0};  // a bit for each of the first 64 GPUs; for other GPUs, every call loads
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (loaded.load(std::memory_order_acquire) & bit) return cudaSuccess;
  for (const Kernel* kernel = Kernel::first(); kernel; kernel = kernel->next) {
    constexpr size_t without_asking = 48 * 1024;
    cudaFuncAttributes attributes;
    bool exists = cudaFuncGetAttributes(&attributes, kernel->function) == cudaSuccess;
    if (exists && kernel->shared > without_asking)
      exists = cudaFuncSetAttribute(kernel->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                   static_cast<int>(kernel->shared)) == cudaSuccess;
    // A kernel for another architecture does not exist on this GPU and is never launched there. The error of the query
    // is cleared here, so that a later call does not report it.
    if (!exists) cudaGetLastError();
  }
  loaded.fetch_or(bit, std::memory_order_release);
  return cudaSuccess;
}

bool is_generation_known() {
  return requested_generation() != 0;
}

}  // namespace efft

// Loads the kernels. CUDA would otherwise load each when it is first launched, which must not happen while a graph is
// captured: there, a warm-up on other shapes may have launched other kernels.
#include <atomic>

#include "kernels.h"
#include "launch.h"

namespace efft {

cudaError_t load_kernels() {
  static std::atomic<uint64_t> loaded{0};  // a bit per GPU; one beyond them loads again at every call
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
    // Kernels of another architecture are not there, and are not launched: nobody is to find that error.
    if (!exists) cudaGetLastError();
  }
  loaded.fetch_or(bit, std::memory_order_release);
  return cudaSuccess;
}

}  // namespace efft

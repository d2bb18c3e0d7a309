// Wraps the instructions for which C++ has no syntax, and defines the number formats. The emulator in
// tests/csrc/emulation implements the same functions for the CPU. Its header defines the include guard of this file, so
// that the other files in this folder compile for the emulator without changes.
#ifndef EFFT_INSTRUCTIONS
#define EFFT_INSTRUCTIONS

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace efft {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float widen(float value) {
  return value;
}
__device__ inline float widen(bf16 value) {
  return __bfloat162float(value);
}
__device__ inline float widen(fp16 value) {
  return __half2float(value);
}

// Rounds to nearest, ties to even.
template <class T>
__device__ T narrow(float value);
template <>
__device__ inline float narrow(float value) {
  return value;
}
template <>
__device__ inline bf16 narrow(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline fp16 narrow(float value) {
  return __float2half_rn(value);
}

// Returns 2^x with a relative error of about 2^-22. Results that are not normal numbers become zero.
__device__ inline float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(x));
  return power;
}

// Returns 1 / x with a relative error of about 2^-23. Results that are not normal numbers become zero.
__device__ inline float fast_reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(inverse) : "f"(x));
  return inverse;
}

// Returns the dynamic shared memory of the block. It is aligned to 1024 bytes, because tensor copies (TMA) need this
// for swizzled tiles.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Allows the next kernel of the stream to start while this kernel still runs. The next kernel must then call
// wait_for_kernel_in_front. This has no effect unless the next kernel is launched with LaunchShape::dependent.
__device__ inline void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Waits until the previous kernel of the stream has ended and its results are visible. Before this call, a kernel that
// was launched with LaunchShape::dependent must neither read nor write memory that other kernels use.
__device__ inline void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Returns threadIdx.x. The compiler does not compute values that depend on the result before this call, so that they
// occupy no registers until then.
__device__ inline uint32_t read_thread_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

// Returns the value. The compiler does not compute values that depend on the result before this call.
__device__ inline int recompute_from(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ inline int64_t recompute_from(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Prefetches a tensor map into the cache for tensor maps. No earlier kernel may still be writing the map.
__device__ inline void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Waits for all threads of the cluster. All their writes to shared memory are then visible to every block of the
// cluster.
__device__ inline void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// Returns a float from the shared memory of a block of the cluster. It has the same address there as `own` has in this
// block.
__device__ inline float read_shared_of(uint32_t block, const float* own) {
  uint32_t address;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(shared_address(own)), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// Waits at a barrier of the block until `threads` threads have arrived, including the waiting ones. Complete warps must
// arrive. Barrier 0 belongs to __syncthreads.
__device__ inline void wait_for_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// Arrives at a barrier of the block without waiting. Complete warps must arrive.
__device__ inline void arrive_for_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

// Puts all bulk stores that this thread has started since the last call into one group.
__device__ inline void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

// Waits until all groups of this thread's bulk stores except the N newest have read shared memory, which may then be
// written again. The results are in global memory when the kernel has ended.
template <int N>
__device__ inline void wait_until_stores_have_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(N) : "memory");
}

// Stores four 8x8 matrices of 16-bit elements in shared memory. Lanes 8 i .. 8 i + 7 pass the addresses of the rows of
// matrix i. Of each matrix, a lane passes element (lane / 4, 2 (lane % 4)) and the next element of that row.
__device__ inline void store_matrices(void* row, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(shared_address(row)),
      "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
      : "memory");
}

// Sends registers asynchronously to the shared memory of another block of the cluster. They are written at the address
// that `own` has in this block. A barrier of the other block, at the address that `barrier` has in this block, counts
// the bytes that have arrived.
template <int N>
__device__ inline void send_async(uint32_t block, const uint32_t (&values)[N], uint32_t* own, const void* barrier) {
  static_assert(N == 2 || N == 4);
  uint32_t to, counted;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(to) : "r"(shared_address(own)), "r"(block));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(counted) : "r"(shared_address(barrier)), "r"(block));
  if constexpr (N == 4)
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(to),
        "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3]), "r"(counted)
        : "memory");
  else
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];\n" ::"r"(to),
        "r"(values[0]), "r"(values[1]), "r"(counted)
        : "memory");
}
#endif

// Starts an asynchronous copy of 16 bytes to shared memory. Only the first `bytes` bytes are read, and the rest is
// filled with zeros.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
      : "memory");
}

// Puts all copies that this thread has started since the last call into one group.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until all groups of this thread's copies except the N newest have arrived.
template <int N>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements. Lanes 8 i .. 8 i + 7 pass the addresses of the rows of matrix i. From
// each matrix, a lane receives element (lane / 4, 2 (lane % 4)) and the next element of that row.
// load_matrices_transposed returns these elements of the transposed matrices.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "r"(shared_address(row))
      : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "r"(shared_address(row))
      : "memory");
}

// Computes sums [16, 8] += a [16, 16] b [16, 8]. All three matrices are distributed over the registers of a warp. T is
// the type of the elements of a and b.
template <class T>
__device__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void multiply_add<bf16>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add<fp16>(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace efft

#endif  // EFFT_INSTRUCTIONS

// The instructions that C++ has no words for, and the number formats. tests/csrc/emulation has the same functions for
// the CPU, and defines this file's guard: nothing else in this folder knows of it.
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

// The block's dynamic shared memory, aligned as the swizzled tiles of tensor copies need it.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Lets the next kernel of the stream start although this one still runs; it waits by the next function. Kernels that
// are launched without `dependent` do nothing here.
__device__ inline void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Waits until the kernel in front has ended and its results can be read. Before that a dependent kernel must neither
// read nor write memory that others use.
__device__ inline void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Fetches a tensor map, which no kernel in front may be writing, into its cache.
__device__ inline void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Waits for all threads of the cluster; what they have written to shared memory is then visible in all its blocks.
__device__ inline void synchronize_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// The element of another block of the cluster that lies in its shared memory where `own` lies in that of this block.
__device__ inline float read_shared_of(uint32_t block, const float* own) {
  uint32_t address;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(shared_address(own)), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// Sends registers to the place in another block's shared memory where `own` lies in that of this block. They arrive
// asynchronously, and the barrier of that block that lies where `barrier` lies in this one counts their bytes.
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

// Starts to copy 16 bytes, of which the first `bytes` are read and the others become zero.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
      : "memory");
}

// Ends a group of copies.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most the N newest groups of this thread are under way.
template <int N>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lanes 8 i .. 8 i + 7 point at the rows of matrix i. Of each matrix a lane gets
// elements (lane / 4, 2 (lane % 4)) and the next in the row; of a transposed one those of its transpose.
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

// sums [16, 8] += a [16, 16] b [16, 8], fragments of a warp; T is the type of a and b.
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

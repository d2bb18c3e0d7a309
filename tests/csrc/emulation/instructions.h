// Implements the functions of csrc/cuda/instructions.cuh for the emulator on the CPU, and defines the words that CUDA
// adds to C++. The compiler includes this file before every kernel file. The threads ("lanes") of a warp execute some
// instructions together. Each lane waits until all lanes of its warp have reached the instruction, and the last one
// executes it for the warp. The PTX manual defines which elements of a matrix each lane holds.
#pragma once
#define EFFT_INSTRUCTIONS

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define __syncthreads() emulation::wait_for_block(__LINE__)
#define __syncwarp() emulation::synchronize_warp()
#define __shfl_xor_sync(mask, value, other) emulation::exchange(mask, value, other)

extern dim3 gridDim;

namespace emulation {

dim3 thread_index();
dim3 block_index();
unsigned char* shared_memory();
void wait_for_block(int line);
void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_copies(int under_way);

// The instructions that the lanes of a warp execute together.
enum class Together {
  load,
  load_transposed,
  multiply_bf16,
  multiply_fp16,
  exchange,
  sync,
  product,
  products_fence,
  products_commit,
  products_wait,
  registers,
  cluster_arrive,
  cluster_wait,
  store,
  threads_arrive,
  threads_wait
};

struct Product;

// The operands of one lane for such an instruction, and the place for the lane's part of the result. A comment names
// the instructions that use a field.
struct Lane {
  Together what;
  const void* row = nullptr;      // load, store: address of one row of a matrix
  uint32_t* loaded = nullptr;     // load: [4], result
  float* sums = nullptr;          // multiply: [4], operand and result
  const uint32_t* a = nullptr;    // multiply, store: [4]
  const uint32_t* b = nullptr;    // multiply: [2]
  float value = 0, received = 0;  // exchange: operand and result
  int other = 0;  // exchange: the other lane is this lane's number XOR `other`; threads_*: number of threads
  const Product* product = nullptr;  // product
  int number = 0;  // products_wait: number of groups that may remain incomplete; registers: number of registers;
                   // threads_*: number of the barrier
};
void together(Lane& lane);

float exchange(unsigned mask, float value, int other);
void synchronize_warp();

void arrive_at_cluster();
void wait_for_cluster();
float read_shared_of(uint32_t block, const float* own);
void send_async(uint32_t block, const uint32_t* values, uint32_t bytes, const void* own, const void* barrier);
void wait_for_kernel_in_front();
void wait_for_threads(int barrier, int threads);
void arrive_for_threads(int barrier, int threads);
void commit_stores();
void wait_until_stores_have_read(int newest);
void check_map(const void* map);

}  // namespace emulation

namespace efft {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float widen(float value) {
  return value;
}
inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline float widen(fp16 value) {
  _Float16 half;
  std::memcpy(&half, &value, sizeof half);
  return static_cast<float>(half);
}

template <class T>
T narrow(float value);
template <>
inline float narrow(float value) {
  return value;
}
template <>
inline bf16 narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 narrow(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  fp16 bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

using emulation::arrive_for_threads;
using emulation::commit_copies;
using emulation::commit_stores;
using emulation::copy_async;
using emulation::read_shared_of;
using emulation::shared_memory;
using emulation::wait_for_kernel_in_front;
using emulation::wait_for_threads;

template <int N>
void send_async(uint32_t block, const uint32_t (&values)[N], uint32_t* own, const void* barrier) {
  emulation::send_async(block, values, sizeof values, own, barrier);
}
inline void start_next_kernel() {}
inline float fast_exp2(float x) {
  return std::exp2(x);
}
inline float fast_reciprocal(float x) {
  return 1 / x;
}
inline uint32_t read_thread_index() {
  return threadIdx.x;
}
inline int recompute_from(int value) {
  return value;
}
inline int64_t recompute_from(int64_t value) {
  return value;
}
inline void prefetch_tensor_map(const void* map) {
  emulation::check_map(map);
}
inline void synchronize_cluster() {
  emulation::arrive_at_cluster();
  emulation::wait_for_cluster();
}

template <int N>
void wait_copies() {
  emulation::wait_copies(N);
}

template <int N>
void wait_until_stores_have_read() {
  emulation::wait_until_stores_have_read(N);
}

inline void store_matrices(void* row, const uint32_t (&from)[4]) {
  emulation::Lane lane{emulation::Together::store};
  lane.row = row;
  lane.a = from;
  together(lane);
}
inline void load_matrices(uint32_t (&to)[4], const void* row) {
  emulation::Lane lane{emulation::Together::load};
  lane.row = row;
  lane.loaded = to;
  together(lane);
}
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  emulation::Lane lane{emulation::Together::load_transposed};
  lane.row = row;
  lane.loaded = to;
  together(lane);
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  const bool is_bf16 = std::is_same_v<T, bf16>;
  emulation::Lane lane{is_bf16 ? emulation::Together::multiply_bf16 : emulation::Together::multiply_fp16};
  lane.sums = sums;
  lane.a = a;
  lane.b = b;
  together(lane);
}

}  // namespace efft

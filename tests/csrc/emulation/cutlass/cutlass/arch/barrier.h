// Replaces CUTLASS's file of this name in the emulator. Implements barriers in shared memory. Because this file is
// included after CuTe, it also specializes the functions with which CuTe issues tensor copies and products.
#pragma once

#include <cute/tensor.hpp>
#include <type_traits>

#include "hopper.h"

namespace cutlass::arch {

class ClusterBarrier {
 public:
  void init(uint32_t arrivals) const { emulation::init_barrier(this, arrivals); }
  bool try_wait(uint32_t parity) const { return emulation::test_barrier(this, parity); }
  void wait(uint32_t parity) const { emulation::wait_for_barrier(this, parity); }
  void arrive() const { emulation::arrive_at_barrier(this); }
  void arrive(uint32_t block, uint32_t applies = true) const {
    if (applies) emulation::arrive_at_barrier(this, block);
  }

 private:
  uint64_t state_;
};

class ClusterTransactionBarrier : public ClusterBarrier {
 public:
  void arrive_and_expect_tx(uint32_t bytes) const {
    emulation::expect_bytes(this, bytes);
    emulation::arrive_at_barrier(this);
  }
};

inline void fence_barrier_init() {
  emulation::fence_barrier_init();
}
inline void fence_view_async_shared() {
  emulation::fence_async();
}

}  // namespace cutlass::arch

namespace cute {

template <>
struct detail::CallCOPY<SM90_TMA_LOAD_OP> {
  void operator()(const TmaDescriptor* map, uint64_t* barrier, uint64_t, void* to, int column, int row) const {
    emulation::copy_tile(map, barrier, 0, to, column, row);
  }
};

template <>
struct detail::CallCOPY<SM90_TMA_LOAD_MULTICAST_OP> {
  void operator()(
      const TmaDescriptor* map, uint64_t* barrier, uint16_t mask, uint64_t, void* to, int column, int row) const {
    if (mask == 0) mask = 1 << 15;  // copy_tile reports an error, because a copy to no block is not emulated
    emulation::copy_tile(map, barrier, mask, to, column, row);
  }
};

namespace SM90::GMMA {

template <class T, int N, Major LEFT, Major RIGHT, class Traits, class D, class A, class B>
void emulate(const Traits& traits, D& d, const A& a, const B& b) {
  Tensor sums = recast<float>(d);
  Tensor right = recast<uint64_t>(b);
  emulation::Product product{std::is_same_v<T, bfloat16_t>, N, 0, nullptr, uint64_t(right(0)), LEFT == Major::MN,
      RIGHT == Major::MN, &sums(0), traits.accumulate_ == ScaleOut::One};
  static_assert(decltype(size(sums))::value == N / 2);
  if (&sums(N / 2 - 1) != &sums(0) + (N / 2 - 1)) emulation::fail("sums that do not lie side by side");
  if constexpr (decltype(size(a))::value == 1) {
    Tensor left = recast<uint64_t>(a);
    product.left = uint64_t(left(0));
  } else {
    Tensor left = recast<uint32_t>(a);
    static_assert(decltype(size(left))::value == 4);
    product.registers = &left(0);
    if (&left(3) != &left(0) + 3) emulation::fail("registers that do not lie side by side");
  }
  emulation::multiply_async(product);
}

// Defines overloads of CuTe's mma_unpack for the instructions that csrc/cuda uses. The compiler prefers these
// overloads, because they are more specialized.
#define EFFT_EMULATE(INSTRUCTION, T, N)                                                                              \
  template <Major LEFT, Major RIGHT, class TD, class LD, class TA, class LA, class TB, class LB, class TC, class LC> \
  constexpr void mma_unpack(const MMA_Traits<INSTRUCTION<LEFT, RIGHT, ScaleIn::One, ScaleIn::One>>& traits,          \
      Tensor<TD, LD>& d, const Tensor<TA, LA>& a, const Tensor<TB, LB>& b, const Tensor<TC, LC>&) {                  \
    emulate<T, N, LEFT, RIGHT>(traits, d, a, b);                                                                     \
  }
#define EFFT_EMULATE_SHAPES(T, NAME)                 \
  EFFT_EMULATE(MMA_64x32x16_F32##NAME##_SS, T, 32)   \
  EFFT_EMULATE(MMA_64x16x16_F32##NAME##_SS, T, 16)   \
  EFFT_EMULATE(MMA_64x8x16_F32##NAME##_SS, T, 8)     \
  EFFT_EMULATE(MMA_64x128x16_F32##NAME##_SS, T, 128) \
  EFFT_EMULATE(MMA_64x192x16_F32##NAME##_SS, T, 192) \
  EFFT_EMULATE(MMA_64x256x16_F32##NAME##_SS, T, 256) \
  EFFT_EMULATE(MMA_64x128x16_F32##NAME##_RS, T, 128) \
  EFFT_EMULATE(MMA_64x192x16_F32##NAME##_RS, T, 192) \
  EFFT_EMULATE(MMA_64x256x16_F32##NAME##_RS, T, 256)
EFFT_EMULATE_SHAPES(bfloat16_t, BF16BF16)
EFFT_EMULATE_SHAPES(half_t, F16F16)
#undef EFFT_EMULATE_SHAPES
#undef EFFT_EMULATE

}  // namespace SM90::GMMA

}  // namespace cute

// Includes CUTLASS's file of this name, but replaces the functions that fence, commit and wait for the asynchronous
// products of warp groups by functions of the emulator.
#pragma once

#include "hopper.h"

#define warpgroup_arrive unused_warpgroup_arrive
#define warpgroup_wait unused_warpgroup_wait
#define warpgroup_commit_batch unused_warpgroup_commit_batch
#include_next <cute/arch/mma_sm90_gmma.hpp>
#undef warpgroup_arrive
#undef warpgroup_wait
#undef warpgroup_commit_batch

namespace cute {

inline void warpgroup_arrive() {
  emulation::fence_products();
}
inline void warpgroup_commit_batch() {
  emulation::commit_products();
}
template <int N>
void warpgroup_wait() {
  static_assert(N >= 0 && N <= 7);
  emulation::wait_products(N);
}

}  // namespace cute

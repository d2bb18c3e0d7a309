// Replaces CUTLASS's file of this name in the emulator. Implements clusters of blocks.
#pragma once

#include <cstdint>

#include "hopper.h"

namespace cute {

inline void cluster_arrive_relaxed() {
  emulation::arrive_at_cluster();
}
inline void cluster_arrive() {
  emulation::arrive_at_cluster();
}
inline void cluster_wait() {
  emulation::wait_for_cluster();
}
inline uint32_t block_rank_in_cluster() {
  return emulation::block_rank();
}
inline uint32_t elect_one_sync() {
  return threadIdx.x % 32 == 0;
}

}  // namespace cute

// In the place of CUTLASS's file of this name: registers that warp groups give to one another.
#pragma once

#include "hopper.h"

namespace cutlass::arch {

template <uint32_t COUNT>
void warpgroup_reg_alloc() {
  emulation::set_registers(COUNT);
}
template <uint32_t COUNT>
void warpgroup_reg_dealloc() {
  emulation::set_registers(COUNT);
}

}  // namespace cutlass::arch

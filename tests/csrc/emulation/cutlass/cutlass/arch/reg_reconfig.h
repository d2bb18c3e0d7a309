// Replaces CUTLASS's file of this name in the emulator. Warp groups call these functions to release or request
// registers.
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

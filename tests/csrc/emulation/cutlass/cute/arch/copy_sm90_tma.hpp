// Includes CUTLASS's file of the same name, and replaces the bulk copies of tiles to global memory.
#pragma once

#include "hopper.h"

#define SM90_TMA_STORE UnusedTmaStore
#include_next <cute/arch/copy_sm90_tma.hpp>
#undef SM90_TMA_STORE

namespace cute {

struct SM90_TMA_STORE {
  static void copy(const void* map, const void* from, int column, int row) {
    emulation::store_tile(map, from, column, row);
  }
};

}  // namespace cute

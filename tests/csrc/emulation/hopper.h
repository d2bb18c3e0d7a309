// What compute capability 9.0 adds, for the CPU: barriers that count bytes, copies of tiles by tensor maps, products of
// warp groups, clusters of blocks. The stand-ins for CUTLASS's headers call these functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulation {

// Ends the launch with an error; the first one counts.
void fail(const std::string& what);

// Address of a place in the block's shared memory, as instructions and descriptors give it.
uint32_t shared_address(const void* place);

// Clusters.
uint32_t block_rank();
void arrive_at_cluster();
void wait_for_cluster();

// Barriers in shared memory (mbarrier).
constexpr uint32_t OWN = ~0u;  // block: that of the thread
void init_barrier(const void* barrier, uint32_t arrivals);
void expect_bytes(const void* barrier, uint32_t bytes);
void arrive_at_barrier(const void* barrier, uint32_t block = OWN);
bool test_barrier(const void* barrier, uint32_t parity);
void wait_for_barrier(const void* barrier, uint32_t parity);
void fence_barrier_init();

// Writes of this thread become visible to copies and products, which read by another way than threads do.
void fence_async();

// A tile of a tensor map (cp.async.bulk.tensor), into the blocks of `mask`; 0: into that of the thread alone.
void copy_tile(const void* map, const void* barrier, uint16_t mask, void* to, int column, int row);

// The same from shared memory to the tensor (cp.async.bulk.tensor in the other direction).
void store_tile(const void* map, const void* from, int column, int row);

// Products of a warp group (wgmma): sums [64, columns] += a [64, 16] b [16, columns].
struct Product {
  bool is_bf16;
  int columns;
  uint64_t left;              // descriptor, where a is null
  const uint32_t* registers;  // of the left operand: [4]
  uint64_t right;             // descriptor
  bool left_by_columns, right_by_columns;  // the other order in shared memory (MN-major)
  float* sums;                             // [columns / 2]
  bool adds;                               // to sums, which else start at zero
};
void multiply_async(const Product& product);
void fence_products();
void commit_products();
void wait_products(int under_way);

// setmaxnreg
void set_registers(int count);

}  // namespace emulation

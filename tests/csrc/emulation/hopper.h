// Declares the emulation of the features that compute capability 9.0 adds: barriers that count bytes, tensor copies
// (copies of tiles that a tensor map describes), products of warp groups, and clusters of blocks. The files in
// cutlass/, which replace headers of CUTLASS, call these functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulation {

// Ends the launch with the error `what`. After the first error of a launch, further errors are ignored.
void fail(const std::string& what);

// Returns the address of a place in the shared memory of this thread's block, in the form that instructions and
// descriptors contain.
uint32_t shared_address(const void* place);

// Clusters.
uint32_t block_rank();
void arrive_at_cluster();
void wait_for_cluster();

// Barriers in shared memory (mbarrier).
constexpr uint32_t OWN = ~0u;  // stands for the block of the calling thread
void init_barrier(const void* barrier, uint32_t arrivals);
void expect_bytes(const void* barrier, uint32_t bytes);
void arrive_at_barrier(const void* barrier, uint32_t block = OWN);
bool test_barrier(const void* barrier, uint32_t parity);
void wait_for_barrier(const void* barrier, uint32_t parity);
void fence_barrier_init();

// Executes a proxy fence: makes this thread's writes to shared memory visible to asynchronous copies and products,
// which do not see them otherwise.
void fence_async();

// Starts a tensor copy (cp.async.bulk.tensor). The tile begins at (row, column) of the tensor and is copied to the
// blocks whose bits are set in `mask`. If `mask` is 0, it is copied to the block of the calling thread.
void copy_tile(const void* map, const void* barrier, uint16_t mask, void* to, int column, int row);

// A product of a warp group (wgmma): sums [64, columns] += a [64, 16] b [16, columns]. The fields describe the operands
// of one thread.
struct Product {
  bool is_bf16;
  int columns;
  uint64_t left;                           // descriptor of a in shared memory; unused if `registers` is not null
  const uint32_t* registers;               // [4], a in registers, or null
  uint64_t right;                          // descriptor of b in shared memory
  bool left_by_columns, right_by_columns;  // whether the operand is MN-major, instead of K-major, in shared memory
  float* sums;                             // [columns / 2]
  bool adds;                               // whether the product is added to the sums, or replaces them
};
void multiply_async(const Product& product);
void fence_products();
void commit_products();
// Waits until at most `under_way` of the committed groups of products are not complete.
void wait_products(int under_way);

// Sets the number of registers per thread of a warp group (setmaxnreg).
void set_registers(int count);

}  // namespace emulation

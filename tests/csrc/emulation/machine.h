// Declares the state and the functions that the parts of the emulator share: the blocks of the cluster that runs, their
// threads, and the asynchronous copies and products that are under way (started and not complete).
#pragma once

#include <deque>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "hopper.h"
#include "instructions.h"

namespace emulation {

constexpr int WARP = 32, WARP_GROUP = 128;
// The address at which the shared memory of a block begins. As on a GPU, the first KiB is reserved.
constexpr uint32_t SHARED_BASE = 1024;

enum class State : uint8_t {
  ready,
  waits_for_block,
  waits_for_warp,
  waits_for_cluster,
  waits_for_barrier,
  waits_for_products,
  waits_for_threads,
  finished
};

// An asynchronous copy that one thread has started (cp.async).
struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  dim3 index{0, 0, 0};
  State state = State::ready;
  int line = 0;          // source line of the __syncthreads() at which the thread waits
  Lane* lane = nullptr;  // operands of the instruction at which the thread waits for its warp
  // A hash of the barriers in shared memory for which the thread has waited since its warp last executed an instruction
  // together. If the hashes of the lanes differ, the warp is not converged.
  uint64_t alone = 0;
  const void* barrier = nullptr;         // the barrier in shared memory for which the thread waits
  bool arrived = false;                  // whether it has arrived at the cluster's barrier and not waited there yet
  int cluster_phase = 0;                 // phase of the cluster's barrier in which the thread arrived
  int registers = 0;                     // number of registers that the warp group requested, or 0 before a request
  bool waited = false;                   // whether the thread has waited for the previous kernel
  std::vector<Copy> open;                // copies (cp.async) that have not been committed to a group
  std::deque<std::vector<Copy>> groups;  // committed groups of copies that have not arrived
};

struct Block {
  dim3 index{0, 0, 0};
  unsigned char* shared = nullptr;
};

extern std::vector<Thread> threads;  // the threads of all blocks of the cluster, one block after the other
extern std::vector<Block> blocks;
extern size_t running, threads_per_block, shared_bytes;  // `running` is the index of the thread that runs

inline Thread& me() {
  return threads[running];
}
inline size_t my_block() {
  return running / threads_per_block;
}
inline size_t my_warp() {
  return running / WARP;
}

bool failed();
bool block_ended(size_t block);
bool in_stack_of_thread(const void* place);

// Records that a thread, or a copy that it starts, reads or writes memory other than shared memory. The access is an
// error if the previous kernel may still be running.
void touch_global(const void* place, size_t bytes, bool writes);
// start_traffic starts the record of one launch. end_traffic ends it and returns the numbers of bytes read and written.
// Memory is counted in sectors of 32 bytes, and each sector at most once for reads and once for writes.
void start_traffic(bool dependent, const void* stack_of_host);
std::pair<size_t, size_t> end_traffic();
// May hold back one of these warps, which a barrier has released; see EFFT_EMULATION_SEED in emulation.cpp.
void hold_back_one_of(const std::vector<size_t>& warps);
// Lets other threads run until the state of the running thread is `ready` again.
void pause();

// Returns the place of an address in the shared memory of a block. If `bytes` bytes from there do not fit into the
// shared memory, returns null and ends the launch with the error `what`.
unsigned char* shared_at(size_t block, uint32_t address, uint32_t bytes, const char* what);

// One lane calls these functions for its warp after all lanes have reached the instruction.
void add_product(size_t warp, Lane* const* lanes);
void commit_products(size_t warp);
void fence_products(size_t warp);
bool products_done(size_t warp, int under_way);

// The operations that the scheduler can complete while threads wait: asynchronous copies, and products for which a warp
// waits. The first function of each pair returns how many there are, and the second completes number `which` of them.
size_t copies_under_way();
void land_copy(size_t which);
size_t products_waited_for();
void finish_products(size_t which);

// Counts the bytes of a copy that has arrived at the barrier with this address.
void complete_bytes(size_t block, uint32_t address, uint32_t bytes);
// Returns whether a barrier lies in these bytes of the shared memory.
bool barrier_between(size_t block, uint32_t address, uint32_t bytes);

// Return whether a copy under way will write some of these bytes, and whether products under way will read some of
// them.
bool is_copied_to(size_t block, uint32_t address, uint32_t bytes);
bool is_multiplied(size_t block, uint32_t address, uint32_t bytes);

// Returns the number, plus one, of a thread that has written one of these bytes without a proxy fence (fence_async)
// after the write, or 0 if there is none.
size_t unfenced_writer(size_t block, uint32_t address, uint32_t bytes);

// A tile that a bulk store copies from shared memory to a tensor.
struct TileStore {
  std::vector<unsigned char> map;
  int column, row;
  size_t block;
  uint32_t from, bytes;
};
// Returns the bytes that the place of the tile in shared memory contains now.
std::vector<unsigned char> bytes_of(const TileStore& tile);
// Writes those bytes of the tile that lie inside the tensor.
void write_tile(const TileStore& tile, const std::vector<unsigned char>& bytes);
void add_store(const TileStore& tile);
// Returns whether a store will still read some of these bytes.
bool is_stored_from(size_t block, uint32_t address, uint32_t bytes);
// Returns the number of stores that may read shared memory or write global memory earlier than they must.
size_t stores_under_way();
// Lets one of these stores take its next step.
void advance_store(size_t which);

// Checks and records that a thread writes to the shared memory of its block.
void write_shared(size_t thread, void* place, size_t bytes);

// Lets a warp arrive at a numbered barrier of its block, and returns whether the warp may continue.
bool passes_named_barrier(size_t warp, int number, int threads, bool waits);

void check_cluster_barrier();
// The scheduler calls these functions at the start of a cluster, at the end of a thread, and at the end of a block.
void start_barriers();
void start_copies();
void start_products();
void start_accesses();
void start_named_barriers();
void start_stores();
void end_products_of_thread();
void end_copies_of_block(size_t block);
void end_stores_of_thread();
void end_stores_of_block(size_t block);
// Writes the results of all stores at the end of a launch, if the launch succeeded.
void end_stores(bool succeeded);
void end_named_barriers_of_block(size_t block);

}  // namespace emulation

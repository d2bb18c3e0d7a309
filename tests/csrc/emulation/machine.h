// What the parts of the emulator share: the blocks of the cluster that runs, their threads, what is under way.
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
// Where a block's shared memory begins, as on a GPU, which keeps the first KiB for itself.
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

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  dim3 index{0, 0, 0};
  State state = State::ready;
  int line = 0;  // of the block's barrier that it waits at
  Lane* lane = nullptr;
  // Of what the thread has waited for by itself since its warp last did something together: a warp whose lanes differ
  // in this is not converged.
  uint64_t alone = 0;
  const void* barrier = nullptr;  // what it waits for
  bool arrived = false;           // at the cluster's barrier, without having waited yet
  int cluster_phase = 0;          // in which it arrived there
  int registers = 0;              // that its warp group asked for; 0: it did not
  bool waited = false;            // for the kernel in front
  std::vector<Copy> open;         // cp.async: not yet in a group
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  dim3 index{0, 0, 0};
  unsigned char* shared = nullptr;
};

extern std::vector<Thread> threads;  // of all blocks of the cluster, block after block
extern std::vector<Block> blocks;
extern size_t running, threads_per_block, shared_bytes;

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

// A thread, or a copy that it starts, reads or writes memory that is not shared memory: counted, and an error where the
// kernel in front may still be running.
void touch_global(const void* place, size_t bytes, bool writes);
// The start of a launch, and its end: bytes read and written, each 32 of them counted once.
void start_traffic(bool dependent, const void* stack_of_host);
std::pair<size_t, size_t> end_traffic();
// Lets others run until the state of the running thread is `ready` again.
void pause();

// In the block, or an error that says what would leave it.
unsigned char* shared_at(size_t block, uint32_t address, uint32_t bytes, const char* what);

// What one lane does for its warp, once all lanes have come.
void add_product(size_t warp, Lane* const* lanes);
void commit_products(size_t warp);
void fence_products(size_t warp);
bool products_done(size_t warp, int under_way);

// What can happen when threads wait: a copy that lands, products that a warp waits for.
size_t copies_under_way();
void land_copy(size_t which);
size_t products_waited_for();
void finish_products(size_t which);

// A barrier in shared memory gets the bytes that a copy has brought.
void complete_bytes(size_t block, uint32_t address, uint32_t bytes);
bool barrier_between(size_t block, uint32_t address, uint32_t bytes);

// Whether a copy under way will write, or products under way will read, some of these bytes.
bool is_copied_to(size_t block, uint32_t address, uint32_t bytes);
bool is_multiplied(size_t block, uint32_t address, uint32_t bytes);

// The thread, plus one, that wrote one of these bytes and has not fenced that against asynchronous accesses; 0: none.
size_t unfenced_writer(size_t block, uint32_t address, uint32_t bytes);
void forget_writes(size_t block, uint32_t address, uint32_t bytes);

// A tile that a store copies from shared memory, by a tensor map.
struct TileStore {
  std::vector<unsigned char> map;
  int column, row;
  size_t block;
  uint32_t from, bytes;
};
std::vector<unsigned char> bytes_of(const TileStore& tile);  // that are in shared memory now
void write_tile(const TileStore& tile, const std::vector<unsigned char>& bytes);  // what lies inside the tensor
void add_store(const TileStore& tile);
// Whether a store will still read some of these bytes.
bool is_stored_from(size_t block, uint32_t address, uint32_t bytes);
// The stores that can read or write earlier than they must.
size_t stores_under_way();
void advance_store(size_t which);

// A thread writes to shared memory in an instruction of its warp.
void write_shared(size_t thread, void* place, size_t bytes);

// A warp arrives at a barrier of its block; returns whether it may continue.
bool passes_named_barrier(size_t warp, int number, int threads, bool waits);

void check_cluster_barrier();
// At the start of a cluster, at the end of a thread, of a block.
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
void end_stores(bool succeeded);  // of a launch
void end_named_barriers_of_block(size_t block);

}  // namespace emulation

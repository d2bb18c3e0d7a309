// Emulates barriers in shared memory (mbarrier) and the barriers of clusters of blocks.
#include <unordered_map>

#include "machine.h"

namespace emulation {

namespace {

struct Barrier {
  uint32_t arrivals = 0;    // number of arrivals that end a phase
  int64_t missing = 0;      // number of arrivals that are still missing in this phase
  int64_t bytes = 0;        // number of missing bytes; negative if more bytes have arrived than are expected so far
  uint32_t phase = 0;       // number of completed phases
  size_t made_by = 0;       // number of the thread that initialized the barrier
  bool is_visible = false;  // whether a fence has made the barrier visible to other blocks and to copies
};

std::unordered_map<const void*, Barrier> barriers;
int cluster_phase;

Barrier* find(const void* place, bool by_others) {
  const auto found = barriers.find(place);
  if (found == barriers.end()) {
    fail("there is no barrier (yet) at a place that is used as one");
    return nullptr;
  }
  if (by_others && !found->second.is_visible) {
    fail("a barrier is used by a copy or another block before a fence has made it visible");
    return nullptr;
  }
  return &found->second;
}

void end_phase_if_complete(const void* place, Barrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  for (Thread& thread : threads)
    if (thread.state == State::waits_for_barrier && thread.barrier == place) thread.state = State::ready;
}

// Returns the place in another block's shared memory that corresponds to `own` in this block.
const unsigned char* in_block(const void* own, size_t block) {
  return blocks[block].shared + (static_cast<const unsigned char*>(own) - blocks[my_block()].shared);
}

}  // namespace

void start_barriers() {
  barriers.clear();
  cluster_phase = 0;
}

bool barrier_between(size_t block, uint32_t address, uint32_t bytes) {
  const unsigned char* const first = blocks[block].shared + (address - SHARED_BASE);
  for (const auto& [place, _] : barriers)
    if (static_cast<const unsigned char*>(place) >= first && static_cast<const unsigned char*>(place) < first + bytes)
      return true;
  return false;
}

void init_barrier(const void* place, uint32_t arrivals) {
  if (shared_address(place) % 8 != 0) fail("a barrier is not aligned to 8 bytes");
  if (barriers.count(place)) fail("a barrier is initialized twice");
  if (arrivals == 0 || arrivals >= 1u << 20) fail("a barrier of an impossible count");
  Barrier& barrier = barriers[place];
  barrier.arrivals = arrivals;
  barrier.missing = arrivals;
  barrier.made_by = running;
}

void fence_barrier_init() {
  for (auto& [_, barrier] : barriers)
    if (barrier.made_by == running) barrier.is_visible = true;
}

void expect_bytes(const void* place, uint32_t bytes) {
  Barrier* const barrier = find(place, false);
  if (!barrier) return;
  barrier->bytes += bytes;
  if (barrier->bytes >= 1 << 20) fail("a barrier expects more bytes than it can count");
}

void complete_bytes(size_t block, uint32_t address, uint32_t bytes) {
  const void* const place = blocks[block].shared + (address - SHARED_BASE);
  Barrier* const barrier = find(place, true);
  if (!barrier) return;
  barrier->bytes -= bytes;
  end_phase_if_complete(place, *barrier);
}

void arrive_at_barrier(const void* own, uint32_t rank) {
  const size_t block = rank == OWN ? my_block() : rank;
  if (block >= blocks.size()) return fail("an arrival at a block that the cluster does not have");
  if (threads[block * threads_per_block].state == State::finished) {
    bool ended = true;
    for (size_t i = 0; i < threads_per_block; ++i)
      ended = ended && threads[block * threads_per_block + i].state == State::finished;
    if (ended) return fail("an arrival at a barrier of a block that has ended");
  }
  const void* const place = in_block(own, block);
  Barrier* const barrier = find(place, block != my_block());
  if (!barrier) return;
  if (barrier->missing == 0) return fail("a barrier gets more arrivals than it waits for");
  --barrier->missing;
  end_phase_if_complete(place, *barrier);
}

bool test_barrier(const void* place, uint32_t parity) {
  const Barrier* const barrier = find(place, false);
  return !barrier || barrier->phase % 2 != parity;
}

void wait_for_barrier(const void* place, uint32_t parity) {
  if (parity > 1) fail("a parity that is neither 0 nor 1");
  const uint64_t waited = (shared_address(place) << 1 | parity) + 1;
  me().alone = me().alone * 0x9e3779b97f4a7c15u + waited;
  while (!failed() && !test_barrier(place, parity)) {
    me().barrier = place;
    me().state = State::waits_for_barrier;
    pause();
  }
}

uint32_t block_rank() {
  return static_cast<uint32_t>(my_block());
}

void check_cluster_barrier() {
  size_t waiting = 0;
  for (const Thread& thread : threads) {
    if (thread.state == State::finished) continue;
    if (!thread.arrived || thread.cluster_phase != cluster_phase) return;
    ++waiting;
  }
  if (waiting == 0) return;
  ++cluster_phase;
  for (Thread& thread : threads)
    if (thread.state == State::waits_for_cluster) thread.state = State::ready;
}

void arrive_at_cluster() {
  Lane lane{Together::cluster_arrive};
  together(lane);
  if (me().arrived) return fail("a second arrival at the cluster's barrier without a wait between");
  me().arrived = true;
  me().cluster_phase = cluster_phase;
  check_cluster_barrier();
}

void wait_for_cluster() {
  Lane lane{Together::cluster_wait};
  together(lane);
  if (!me().arrived) return fail("a wait at the cluster's barrier without an arrival");
  while (!failed() && me().cluster_phase == cluster_phase) {
    me().state = State::waits_for_cluster;
    pause();
  }
  me().arrived = false;
}

}  // namespace emulation

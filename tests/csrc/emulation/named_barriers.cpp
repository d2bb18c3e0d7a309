// Emulates the numbered barriers of a block (bar.sync and bar.arrive). Complete warps arrive at such a barrier. Some of
// them wait until the given number of threads has arrived, and the others continue at once. Barrier 0 belongs to
// __syncthreads, which emulation.cpp emulates.
#include <algorithm>
#include <array>

#include "machine.h"

namespace emulation {

namespace {

constexpr int NUMBERS = 16;

// The state of one barrier since it was last complete.
struct NamedBarrier {
  int threads = 0;              // number of threads that complete the barrier
  std::vector<size_t> warps;    // the warps that have arrived
  std::vector<size_t> waiting;  // the warps that have arrived and wait
};

std::vector<std::array<NamedBarrier, NUMBERS>> barriers;  // of each block

}  // namespace

void start_named_barriers() {
  barriers.assign(blocks.size(), {});
}

bool passes_named_barrier(size_t warp, int number, int threads, bool waits) {
  if (number < 1 || number >= NUMBERS) return fail("a barrier of an impossible number"), true;
  if (threads <= 0 || threads % WARP != 0 || static_cast<size_t>(threads) > threads_per_block)
    return fail("a barrier for an impossible number of threads"), true;
  NamedBarrier& barrier = barriers[my_block()][static_cast<size_t>(number)];
  const std::string name = "barrier " + std::to_string(number);
  if (!barrier.warps.empty() && barrier.threads != threads)
    return fail("warps arrive at " + name + " with different numbers of threads"), true;
  if (std::find(barrier.warps.begin(), barrier.warps.end(), warp) != barrier.warps.end())
    return fail("a warp arrives again at " + name + " before the others have"), true;
  barrier.threads = threads;
  barrier.warps.push_back(warp);
  if (waits) barrier.waiting.push_back(warp);
  if (barrier.warps.size() * WARP < static_cast<size_t>(threads)) return !waits;
  for (const size_t waiting : barrier.waiting)
    for (size_t i = waiting * WARP; i < (waiting + 1) * WARP; ++i) emulation::threads[i].state = State::ready;
  hold_back_one_of(barrier.waiting);
  barrier = {};
  return true;
}

void end_named_barriers_of_block(size_t block) {
  for (int number = 1; number < NUMBERS; ++number)
    if (!barriers[block][static_cast<size_t>(number)].warps.empty())
      fail("a block ends with an incomplete barrier " + std::to_string(number));
}

void wait_for_threads(int barrier, int threads) {
  Lane lane{Together::threads_wait};
  lane.number = barrier;
  lane.other = threads;
  together(lane);
}

void arrive_for_threads(int barrier, int threads) {
  Lane lane{Together::threads_arrive};
  lane.number = barrier;
  lane.other = threads;
  together(lane);
}

}  // namespace emulation

// Runs CUDA kernels on the CPU. Clusters of blocks run one after the other. Every thread of a cluster is a fiber: it
// has its own stack, and the scheduler in this file switches between the fibers on one CPU thread. The shared memory of
// every block initially contains NaN. An asynchronous copy (cp.async) fills its destination with NaN when it starts,
// and completes when the thread that started it waits for it. The asynchronous operations that compute capability 9.0
// adds, which are tensor copies and products of warp groups, complete only when no thread can run, which is as late as
// possible.
//
// The scheduler runs each thread until it waits, and then the next thread. Environment variables change the emulation:
// - EFFT_EMULATION_REVERSE: if set, the threads run in reverse order. A missing barrier causes a wrong result in one of
//   the two orders.
// - EFFT_EMULATION_SEED: a number. The threads run in a random order, which changes from turn to turn, and asynchronous
//   operations complete at random times. If the number is even, some of the warps that a numbered barrier releases do
//   not run before nothing else can happen. This shows whether the others wait for these warps where they must.
// - EFFT_EMULATION_CAPABILITY: 8 (the default) or 9, the compute capability of the GPU.
// - EFFT_EMULATION_PROCESSORS: the number of multiprocessors of the GPU. The default is 2.
// - EFFT_EMULATION_COUNT: if set, the bytes that each launch reads and writes are counted.
// - EFFT_EMULATION_DRY: if set, launches are recorded, but the kernels do not run.
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "machine.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

dim3 gridDim{0, 0, 0};

extern "C" __attribute__((visibility("default"))) void efft_emulation_coverage(int* run, int* all, int* in_clusters);

namespace emulation {

std::vector<Thread> threads;
std::vector<Block> blocks;
size_t running, threads_per_block, shared_bytes;

namespace {

constexpr size_t STACK = 256 << 10, SHARED_UNASKED = 48 << 10;

// The state in which a thread stopped, from which it continues later.
struct Fiber {
  bool started = false;
  ucontext_t start;
  void* here[5];
  std::unique_ptr<char[]> stack;
};

std::vector<Fiber> fibers;
const std::function<void()>* body;
void* scheduler[5];
std::string error;
std::map<const void*, unsigned> launched;  // number of blocks per cluster in the last launch of each kernel
std::map<const void*, size_t> asked;       // bytes of shared memory that each loaded kernel may use

// The launches, see efft_emulation_launches.
std::string log;

constexpr size_t NONE = ~size_t{0};
size_t held_back = NONE;  // the number of a warp that does not run while anything else can happen

int processors() {
  const char* const said = std::getenv("EFFT_EMULATION_PROCESSORS");
  return said ? std::atoi(said) : 2;
}
int capability() {
  const char* const said = std::getenv("EFFT_EMULATION_CAPABILITY");
  return said ? std::atoi(said) : 8;
}
size_t shared_limit() {
  return capability() == 9 ? 232448 : 166912;
}

// The order in which threads run and asynchronous operations complete.
struct Order {
  bool reverse = std::getenv("EFFT_EMULATION_REVERSE") != nullptr,
       drawn = std::getenv("EFFT_EMULATION_SEED") != nullptr;
  unsigned seed = drawn ? static_cast<unsigned>(std::atoi(std::getenv("EFFT_EMULATION_SEED"))) : 0;
  std::mt19937 draw{seed};
  unsigned copies_first = 0;  // the probability, in quarters, that a copy completes before products do

  size_t below(size_t count) { return draw() % count; }
};
Order& order() {
  static Order one;
  return one;
}

[[gnu::noinline]] void jump_to_scheduler() {
  __builtin_longjmp(scheduler, 1);
}
[[gnu::noinline]] void jump_to_thread(Fiber& fiber) {
  __builtin_longjmp(fiber.here, 1);
}

void run_body() {
  (*body)();
  Thread& thread = me();
  thread.groups.emplace_back(std::move(thread.open));
  for (const auto& group : thread.groups)
    if (!group.empty()) fail("a thread ends with copies under way");
  end_products_of_thread();
  end_stores_of_thread();
  thread.state = State::finished;
  if (block_ended(my_block())) {
    end_copies_of_block(my_block());
    end_stores_of_block(my_block());
    end_named_barriers_of_block(my_block());
  }
  check_cluster_barrier();
  jump_to_scheduler();
}

[[gnu::noinline]] void resume(size_t number) {
  running = number;
  Fiber& fiber = fibers[number];
  if (__builtin_setjmp(scheduler) != 0) return;
  if (fiber.started) jump_to_thread(fiber);
  fiber.started = true;
  setcontext(&fiber.start);
}

void prepare(size_t number) {
  Fiber& fiber = fibers[number];
  if (!fiber.stack) fiber.stack.reset(new char[STACK]);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), STACK);
#endif
  threads[number] = {};
  threads[number].index = dim3(static_cast<unsigned>(number % threads_per_block), 0, 0);
  fiber.started = false;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_body, 0);
}

// Lets the threads of a block continue if all of them wait at the same barrier, and returns whether they do.
bool opens_barrier(size_t block) {
  const size_t first = block * threads_per_block, count = threads_per_block;
  size_t waiting = 0, finished = 0;
  for (size_t i = first; i < first + count; ++i) {
    waiting += threads[i].state == State::waits_for_block;
    finished += threads[i].state == State::finished;
  }
  if (waiting == 0) return false;
  bool same = waiting == count;
  for (size_t i = first; i < first + count; ++i) same = same && threads[i].line == threads[first].line;
  if (!same) {
    if (waiting + finished == count)
      fail("divergent barrier: " + std::to_string(waiting) + " of " + std::to_string(count) + " threads wait at one, " +
           std::to_string(finished) + " have ended");
    return false;
  }
  for (size_t i = first; i < first + count; ++i) {
    if (threads[i].alone != threads[i / WARP * WARP].alone)
      fail("a barrier of the block by a warp that is not converged");
    threads[i].state = State::ready;
  }
  for (size_t i = first; i < first + count; ++i) threads[i].alone = 0;
  return true;
}

// Completes one copy or the products that one warp waits for, and returns whether there were any.
bool something_happens() {
  if (order().drawn && stores_under_way() > 0 && order().below(8) == 0)
    advance_store(order().below(stores_under_way()));
  const size_t copies = copies_under_way(), products = products_waited_for();
  if (copies + products == 0) return false;
  Order& by = order();
  const bool copy = by.drawn ? by.below(4) < by.copies_first : !by.reverse;
  if (copies > 0 && (copy || products == 0))
    land_copy(by.drawn ? by.below(copies) : by.reverse ? copies - 1 : 0);
  else
    finish_products(by.drawn ? by.below(products) : by.reverse ? products - 1 : 0);
  return true;
}

void fail_at_standstill() {
  std::string where;
  static constexpr const char* NAMES[] = {"", "the block's barrier", "other lanes of the warp", "the cluster's barrier",
      "a barrier in shared memory", "products", "a barrier with a number", ""};
  for (size_t i = 0; i < threads.size(); ++i) {
    const State state = threads[i].state;
    if (state == State::finished || (i > 0 && threads[i - 1].state == state)) continue;
    where += "; thread " + std::to_string(i) + " and the next wait for " + NAMES[static_cast<int>(state)];
  }
  fail("deadlock: lanes of a warp, blocks or copies wait for others" + where);
}

void run_cluster() {
  const size_t count = threads.size();
  for (size_t i = 0; i < count; ++i) prepare(i);
  for (const Block& one : blocks) std::memset(one.shared, 0xff, shared_bytes);
  start_barriers();
  start_copies();
  start_products();
  start_accesses();
  start_named_barriers();
  start_stores();
  std::vector<size_t> numbers(count);
  for (size_t i = 0; i < count; ++i) numbers[i] = order().reverse ? count - 1 - i : i;
  order().copies_first = static_cast<unsigned>(order().below(5));
  // One block of the cluster starts only when no other thread can run, so that the other blocks must wait for it.
  size_t late = order().reverse ? 0 : blocks.size() - 1;
  if (order().drawn) late = order().below(blocks.size() + 1);
  if (blocks.size() == 1) late = blocks.size();
  held_back = NONE;
  while (error.empty()) {
    bool ran = false, all_finished = true;
    if (order().drawn) std::shuffle(numbers.begin(), numbers.end(), order().draw);
    for (size_t i = 0; i < count && error.empty(); ++i) {
      if (threads[numbers[i]].state == State::ready && numbers[i] / threads_per_block != late &&
          numbers[i] / WARP != held_back) {
        resume(numbers[i]);
        ran = true;
      }
      all_finished = all_finished && threads[numbers[i]].state == State::finished;
    }
    if (all_finished || !error.empty()) return;
    bool opened = false;
    for (size_t block = 0; !ran && block < blocks.size(); ++block) opened = opens_barrier(block) || opened;
    if (ran ? order().drawn && order().below(8) == 0 : !opened && error.empty()) {
      if (something_happens() || ran) continue;
      if (held_back != NONE) {
        held_back = NONE;
        continue;
      }
      if (late == blocks.size()) fail_at_standstill();
      late = blocks.size();
    }
  }
}

}  // namespace

void fail(const std::string& what) {
  if (!error.empty()) return;
  error = what;
  if (blocks.empty()) return;
  const dim3 block = blocks[my_block()].index;
  error += " (block " + std::to_string(block.x) + "," + std::to_string(block.y) + "," + std::to_string(block.z) +
           ", thread " + std::to_string(running % threads_per_block) + ")";
}
bool failed() {
  return !error.empty();
}

bool block_ended(size_t block) {
  const auto first = threads.begin() + static_cast<std::ptrdiff_t>(block * threads_per_block);
  return std::all_of(first, first + static_cast<std::ptrdiff_t>(threads_per_block),
      [](const Thread& thread) { return thread.state == State::finished; });
}

bool in_stack_of_thread(const void* place) {
  const auto* const at = static_cast<const char*>(place);
  const char* const stack = fibers[running].stack.get();
  return at >= stack && at < stack + STACK;
}

void hold_back_one_of(const std::vector<size_t>& warps) {
  if (order().drawn && order().seed % 2 == 0 && !warps.empty() && order().below(4) == 0)
    held_back = warps[order().below(warps.size())];
}

[[gnu::noinline]] void pause() {
  if (__builtin_setjmp(fibers[running].here) == 0) jump_to_scheduler();
}

unsigned char* shared_at(size_t block, uint32_t address, uint32_t bytes, const char* what) {
  if (address >= SHARED_BASE && address + bytes <= SHARED_BASE + shared_bytes)
    return blocks[block].shared + (address - SHARED_BASE);
  fail(what);
  return nullptr;
}

uint32_t shared_address(const void* place) {
  const auto offset = static_cast<const unsigned char*>(place) - blocks[my_block()].shared;
  if (offset < 0 || static_cast<size_t>(offset) >= shared_bytes)
    fail("an address that is not in the block's shared memory");
  return SHARED_BASE + static_cast<uint32_t>(offset);
}

dim3 thread_index() {
  return me().index;
}
dim3 block_index() {
  return blocks[my_block()].index;
}
unsigned char* shared_memory() {
  return blocks[my_block()].shared;
}

void wait_for_block(int line) {
  me().state = State::waits_for_block;
  me().line = line;
  pause();
}

cudaError_t run(const Launch& launch, const void* kernel, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  error.clear();
  blocks.clear();
  launched[kernel] = launch.cluster;
  const dim3 grid = gridDim = launch.grid;
  const size_t count = launch.threads;
  running = 0;
  if (grid.x * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("an impossible grid");
  if (count % WARP != 0 || count > 1024) fail("a block that is not whole warps");
  const auto loaded = asked.find(kernel);
  if (loaded == asked.end()) fail("a kernel that a launch would have to load, which a capture forbids");
  if (loaded != asked.end() && launch.shared_bytes > loaded->second) fail("more shared memory than was asked for");
  if (launch.cluster == 0 || grid.x % launch.cluster != 0) fail("a grid that is not whole clusters");
  if (!error.empty()) return cudaErrorLaunchFailure;
  if (launch.dependent && capability() < 9) fail("a dependent launch on a GPU that does not have it");
  if (!error.empty()) return cudaErrorLaunchFailure;
  start_traffic(launch.dependent, __builtin_frame_address(0));
  const auto write_log = [&] {
    Dl_info library{};
    dladdr(reinterpret_cast<const void*>(&efft_emulation_coverage), &library);
    const auto [read, written] = end_traffic();
    std::string line;
    for (const size_t number :
        {static_cast<size_t>(static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase)),
            size_t{grid.x}, size_t{grid.y}, size_t{grid.z}, count, size_t{launch.cluster}, size_t{launch.dependent},
            read, written})
      line += (line.empty() ? "" : " ") + std::to_string(number);
    log += line + "\n";
  };
  if (std::getenv("EFFT_EMULATION_DRY")) {
    write_log();
    return cudaSuccess;
  }
  threads_per_block = count;
  shared_bytes = launch.shared_bytes;
  threads.resize(count * launch.cluster);
  if (fibers.size() < threads.size()) fibers.resize(threads.size());
  blocks.resize(launch.cluster);
  // The memory of each block has exactly this size, so that the address sanitizer reports an access past its end.
  std::vector<std::unique_ptr<void, decltype(&std::free)>> memory;
  for (Block& block : blocks) {
    void* bytes = nullptr;
    if (posix_memalign(&bytes, 1024, shared_bytes) != 0) fail("no memory");
    memory.emplace_back(bytes, &std::free);
    block.shared = static_cast<unsigned char*>(bytes);
  }
  body = &thread;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x && error.empty(); x += launch.cluster) {
        for (unsigned i = 0; i < launch.cluster; ++i) blocks[i].index = dim3(x + i, y, z);
        run_cluster();
      }
  end_stores(error.empty());
  write_log();
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulation

extern "C" {

// Returns the launches since the last call, one per line, without those that were refused. A line consists of numbers:
// the distance in bytes from the start of the library to the code of the kernel, the three sizes of the grid, the
// number of threads per block, the number of blocks per cluster, 1 if the launch is dependent or else 0, and the
// numbers of bytes read and written, which are 0 without EFFT_EMULATION_COUNT.
__attribute__((visibility("default"))) const char* efft_emulation_launches() {
  static std::string said;
  said.swap(emulation::log);
  emulation::log.clear();
  return said.c_str();
}

// Sets `run` to the number of kernels that have been launched, `all` to the number of kernels that the library has
// loaded, and `in_clusters` to the number of kernels whose last launch had clusters of several blocks.
__attribute__((visibility("default"))) void efft_emulation_coverage(int* run, int* all, int* in_clusters) {
  *run = static_cast<int>(emulation::launched.size());
  *all = static_cast<int>(emulation::asked.size());
  *in_clusters = static_cast<int>(std::count_if(
      emulation::launched.begin(), emulation::launched.end(), [](const auto& kernel) { return kernel.second > 1; }));
}

const char* cudaGetErrorString(cudaError_t) {
  return emulation::error.c_str();
}

cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  emulation::asked.emplace(kernel, emulation::SHARED_UNASKED);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > emulation::shared_limit()) return cudaErrorLaunchFailure;
  emulation::asked[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::processors() : emulation::capability();
  return cudaSuccess;
}

}  // extern "C"

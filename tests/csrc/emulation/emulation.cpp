// Runs kernels on the CPU: a fiber for every thread of a block, blocks in turn. Shared memory starts full of NaN in
// every block; an asynchronous copy leaves NaN behind at once and arrives when its thread waits for it; threads run in
// order, or with EFFT_EMULATION_REVERSE in reverse, as far as they get, so that a missing barrier shows in one of the
// two.
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "instructions.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulation {

namespace {

constexpr int WARP = 32;
constexpr size_t STACK = 96 << 10, SHARED_LIMIT = 166912, SHARED_UNASKED = 48 << 10;

enum class State { ready, waits_for_block, waits_for_warp, finished };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  dim3 index{0, 0, 0};
  State state = State::ready;
  bool started = false;
  int line = 0;  // of the barrier it waits at
  Lane* lane = nullptr;
  std::vector<Copy> open;  // not yet in a group
  std::deque<std::vector<Copy>> groups;
  ucontext_t start;
  void* here[5];
  std::unique_ptr<char[]> stack;
};

std::vector<Thread> threads;
size_t running;
dim3 block{0, 0, 0};
unsigned char* shared;
size_t shared_bytes;
const std::function<void()>* body;
void* scheduler[5];
std::string error;
std::map<const void*, size_t> asked;

void fail(const std::string& what) {
  if (error.empty())
    error = what + " (block " + std::to_string(block.x) + "," + std::to_string(block.y) + "," +
            std::to_string(block.z) + ", thread " + std::to_string(running) + ")";
}

[[gnu::noinline]] void jump_to_scheduler() {
  __builtin_longjmp(scheduler, 1);
}
[[gnu::noinline]] void jump_to_thread(Thread& thread) {
  __builtin_longjmp(thread.here, 1);
}

void run_body() {
  (*body)();
  Thread& me = threads[running];
  me.groups.emplace_back(std::move(me.open));
  for (const auto& group : me.groups)
    if (!group.empty()) fail("a thread ends with copies under way");
  me.state = State::finished;
  jump_to_scheduler();
}

[[gnu::noinline]] void pause() {
  Thread& me = threads[running];
  if (__builtin_setjmp(me.here) == 0) jump_to_scheduler();
}

[[gnu::noinline]] void resume(size_t number) {
  running = number;
  Thread& thread = threads[number];
  if (__builtin_setjmp(scheduler) != 0) return;
  if (thread.started) jump_to_thread(thread);
  thread.started = true;
  setcontext(&thread.start);
}

void prepare(Thread& thread, size_t number) {
  if (!thread.stack) thread.stack.reset(new char[STACK]);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(thread.stack.get(), STACK);
#endif
  thread.index = dim3(static_cast<unsigned>(number), 0, 0);
  thread.state = State::ready;
  thread.started = false;
  thread.open.clear();
  thread.groups.clear();
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.get();
  thread.start.uc_stack.ss_size = STACK;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, run_body, 0);
}

// Whether everybody waits at one barrier, and may go on.
bool opens_barrier(size_t count) {
  size_t waiting = 0, finished = 0;
  for (size_t i = 0; i < count; ++i) {
    waiting += threads[i].state == State::waits_for_block;
    finished += threads[i].state == State::finished;
  }
  if (waiting == 0) return false;
  bool same = waiting == count;
  for (size_t i = 0; i < count; ++i) same = same && threads[i].line == threads[0].line;
  if (!same)
    fail("divergent barrier: " + std::to_string(waiting) + " of " + std::to_string(count) + " threads wait at one, " +
         std::to_string(finished) + " have ended");
  for (size_t i = 0; same && i < count; ++i) threads[i].state = State::ready;
  return same;
}

void run_block(size_t count) {
  static const bool reverse = std::getenv("EFFT_EMULATION_REVERSE") != nullptr;
  for (size_t i = 0; i < count; ++i) prepare(threads[i], i);
  std::memset(shared, 0xff, shared_bytes);
  while (error.empty()) {
    bool ran = false, all_finished = true;
    for (size_t i = 0; i < count && error.empty(); ++i) {
      const size_t number = reverse ? count - 1 - i : i;
      if (threads[number].state == State::ready) {
        resume(number);
        ran = true;
      }
      all_finished = all_finished && threads[number].state == State::finished;
    }
    if (all_finished) return;
    if (!ran && !opens_barrier(count)) fail("deadlock: lanes of a warp wait for others");
  }
}

struct Half2 {
  float first, second;
};

template <class T>
Half2 unpack(uint32_t bits) {
  T values[2];
  std::memcpy(values, &bits, sizeof bits);
  return {efft::widen(values[0]), efft::widen(values[1])};
}

// ldmatrix .x4 of 8x8 elements of 16 bits: lane 8 i + j points at row j of matrix i.
void load(Lane* const* lanes, bool transposed) {
  uint16_t matrices[4][8][8];
  for (int lane = 0; lane < WARP; ++lane) {
    if (reinterpret_cast<uintptr_t>(lanes[lane]->row) % 16 != 0) fail("a matrix row is not aligned");
    std::memcpy(matrices[lane / 8][lane % 8], lanes[lane]->row, 16);
  }
  for (int lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4, column = lane % 4 * 2;
      uint32_t bits[2];
      for (int next = 0; next < 2; ++next)
        bits[next] = transposed ? matrices[i][column + next][row] : matrices[i][row][column + next];
      lanes[lane]->loaded[i] = bits[0] | bits[1] << 16;
    }
}

// mma.sync.m16n8k16.row.col: with g = lane / 4 and t = lane % 4, register i of a holds row g (+ 8 if i is odd), columns
// 2 t and 2 t + 1 (+ 8 from i = 2 on); of b rows 2 t and 2 t + 1 (+ 8 for i = 1), column g; sums i are at row g (+ 8
// from i = 2 on), column 2 t + i % 2.
template <class T>
void multiply(Lane* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const auto [first, second] = unpack<T>(lanes[lane]->a[i]);
      a[g + i % 2 * 8][2 * t + i / 2 * 8] = first;
      a[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = second;
    }
    for (int i = 0; i < 2; ++i) {
      const auto [first, second] = unpack<T>(lanes[lane]->b[i]);
      b[2 * t + i * 8][g] = first;
      b[2 * t + i * 8 + 1][g] = second;
    }
  }
  for (int lane = 0; lane < WARP; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) lanes[lane]->sums[i] += a[row][k] * b[k][column];
    }
}

}  // namespace

dim3 thread_index() {
  return threads[running].index;
}
dim3 block_index() {
  return block;
}
unsigned char* shared_memory() {
  return shared;
}

void wait_for_block(int line) {
  threads[running].state = State::waits_for_block;
  threads[running].line = line;
  pause();
}

void copy_async(void* to, const void* from, int bytes) {
  auto* const place = static_cast<unsigned char*>(to);
  if (place < shared || place + 16 > shared + shared_bytes) fail("a copy goes past the shared memory asked for");
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("a copy is not aligned to 16 bytes");
  if (bytes < 0 || bytes > 16) fail("a copy of more than 16 bytes");
  if (!error.empty()) return;
  std::memset(to, 0xff, 16);
  threads[running].open.push_back({to, from, bytes});
}

void commit_copies() {
  Thread& me = threads[running];
  me.groups.emplace_back(std::move(me.open));
  me.open.clear();
}

void wait_copies(int under_way) {
  auto& groups = threads[running].groups;
  while (groups.size() > static_cast<size_t>(under_way)) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.pop_front();
  }
}

void together(Lane& lane) {
  const size_t first = running / WARP * WARP;
  threads[running].lane = &lane;
  threads[running].state = State::waits_for_warp;
  Lane* lanes[WARP];
  for (int i = 0; i < WARP; ++i) {
    if (threads[first + i].state != State::waits_for_warp) return pause();
    lanes[i] = threads[first + i].lane;
    if (lanes[i]->what != lane.what) return fail("lanes of a warp do different things together"), pause();
  }
  switch (lane.what) {
    case Together::load:
      load(lanes, false);
      break;
    case Together::load_transposed:
      load(lanes, true);
      break;
    case Together::multiply_bf16:
      multiply<efft::bf16>(lanes);
      break;
    case Together::multiply_fp16:
      multiply<efft::fp16>(lanes);
      break;
    case Together::exchange:
      for (int i = 0; i < WARP; ++i) lanes[i]->received = lanes[i ^ lanes[i]->other]->value;
  }
  for (int i = 0; i < WARP; ++i) threads[first + i].state = State::ready;
}

float exchange(unsigned mask, float value, int other) {
  if (mask != 0xffffffffu) fail("an exchange without the whole warp");
  Lane lane{Together::exchange};
  lane.value = value;
  lane.other = other;
  together(lane);
  return lane.received;
}

cudaError_t run(const cudaLaunchConfig_t& launch, const void* kernel, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  error.clear();
  const dim3 grid = launch.gridDim;
  const size_t count = launch.blockDim.x, allowed = asked.count(kernel) ? asked[kernel] : SHARED_UNASKED;
  running = 0;
  if (grid.x * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("an impossible grid");
  if (count % WARP != 0 || count > 1024) fail("a block that is not whole warps");
  if (launch.dynamicSmemBytes > allowed) fail("more shared memory than was asked for");
  if (threads.size() < count) threads.resize(count);
  shared_bytes = launch.dynamicSmemBytes;
  // Of exactly this size, so that the address sanitizer sees an access past its end.
  const std::unique_ptr<void, decltype(&std::free)> memory(
      aligned_alloc(128, (shared_bytes + 127) / 128 * 128), &std::free);
  shared = static_cast<unsigned char*>(memory.get());
  body = &thread;
  for (block.z = 0; block.z < grid.z && error.empty(); ++block.z)
    for (block.y = 0; block.y < grid.y && error.empty(); ++block.y)
      for (block.x = 0; block.x < grid.x && error.empty(); ++block.x) run_block(count);
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t) {
  return emulation::error.c_str();
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > emulation::SHARED_LIMIT) return cudaErrorLaunchFailure;
  emulation::asked[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

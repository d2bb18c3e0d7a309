// Checks every read and write of the emulated threads. The kernels are compiled with -fsanitize=thread, so that the
// compiler inserts a call before every access. This file defines the called functions, instead of the library of the
// sanitizer. A thread must not access the shared memory of another block or memory that an asynchronous copy is
// filling, and must not write memory that a product has yet to read. A thread must also execute a proxy fence after a
// write to shared memory, before asynchronous copies and products use that memory, because these do not see the writes
// of threads otherwise.
//
// The file also counts the bytes of global memory that a launch reads and writes. If a launch may start before the
// previous kernel has ended, the file reports every access to global memory before the thread has waited for that
// kernel.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <unordered_set>

#include "machine.h"

namespace emulation {

namespace {

// For each byte of shared memory of each block: the number, plus one, of the thread that wrote it and has not fenced
// the write yet, or 0.
std::vector<uint16_t> writers;
// For each thread: the ranges (first byte, number of bytes) that it has written and not fenced yet.
std::vector<std::vector<std::pair<size_t, size_t>>> wrote;

}  // namespace

void start_accesses() {
  writers.assign(blocks.size() * shared_bytes, 0);
  wrote.assign(threads.size(), {});
}

size_t unfenced_writer(size_t block, uint32_t address, uint32_t bytes) {
  const auto first = writers.begin() + static_cast<std::ptrdiff_t>(block * shared_bytes + (address - SHARED_BASE));
  const auto found = std::find_if(first, first + bytes, [](uint16_t writer) { return writer != 0; });
  return found == first + bytes ? 0 : *found;
}

void fence_async() {
  for (const auto& [first, bytes] : wrote[running])
    for (size_t i = first; i < first + bytes; ++i)
      if (writers[i] == running + 1) writers[i] = 0;
  wrote[running].clear();
  fence_barrier_init();
}

void write_shared(size_t thread, void* place, size_t bytes) {
  const size_t block = thread / threads_per_block;
  const auto offset = static_cast<unsigned char*>(place) - blocks[block].shared;
  if (offset < 0 || static_cast<size_t>(offset) + bytes > shared_bytes)
    return fail("a thread writes outside the shared memory");
  const auto at = static_cast<size_t>(offset);
  const auto address = SHARED_BASE + static_cast<uint32_t>(at);
  if (is_copied_to(block, address, static_cast<uint32_t>(bytes)))
    return fail("a thread touches what a copy has not brought yet");
  if (is_stored_from(block, address, static_cast<uint32_t>(bytes)))
    return fail("a thread overwrites what a store has not read yet");
  if (is_multiplied(block, address, static_cast<uint32_t>(bytes)))
    return fail("a thread overwrites what a product under way still reads");
  std::fill_n(writers.begin() + static_cast<std::ptrdiff_t>(block * shared_bytes + at), bytes,
      static_cast<uint16_t>(thread + 1));
  wrote[thread].emplace_back(block * shared_bytes + at, bytes);
}

void access(const void* place, size_t bytes, bool writes) {
  const auto* const at = static_cast<const unsigned char*>(place);
  for (size_t block = 0; block < blocks.size(); ++block) {
    const unsigned char* const shared = blocks[block].shared;
    if (at < shared || at >= shared + shared_bytes) continue;
    if (block != my_block()) return fail("a thread touches the shared memory of another block");
    const auto offset = static_cast<size_t>(at - shared);
    if (offset + bytes > shared_bytes) return fail("a thread reads or writes past the shared memory");
    if (is_copied_to(block, SHARED_BASE + static_cast<uint32_t>(offset), static_cast<uint32_t>(bytes)))
      return fail("a thread touches what a copy has not brought yet");
    if (writes) write_shared(running, blocks[block].shared + offset, bytes);
    return;
  }
  touch_global(place, bytes, writes);
}

namespace {

// `runs` states whether a launch is in progress. Accesses at other times are ignored. They come from the functions that
// launch kernels, which are compiled with the same flags as the kernels. `is_dependent` states whether the launch may
// start before the previous kernel has ended. `host` is the stack frame of the function that launches.
bool runs, is_dependent;
const unsigned char* host;
const bool counts = std::getenv("EFFT_EMULATION_COUNT") != nullptr;
std::unordered_set<uintptr_t> read_sectors, written_sectors;

// Returns whether the memory is part of a stack (which can also hold the arguments of the kernel), or a constant or
// variable of a library. No other kernel uses such memory.
bool is_own(const void* place) {
  constexpr std::ptrdiff_t STACK_OF_HOST = 8 << 20;
  const auto above = static_cast<const unsigned char*>(place) - host;
  Dl_info image;
  return in_stack_of_thread(place) || (above >= 0 && above < STACK_OF_HOST) || dladdr(place, &image) != 0;
}

}  // namespace

void start_traffic(bool dependent, const void* stack_of_host) {
  runs = true;
  is_dependent = dependent;
  host = static_cast<const unsigned char*>(stack_of_host);
  read_sectors.clear();
  written_sectors.clear();
}

std::pair<size_t, size_t> end_traffic() {
  runs = false;
  return {32 * read_sectors.size(), 32 * written_sectors.size()};
}

void touch_global(const void* place, size_t bytes, bool writes) {
  if (!runs) return;
  const bool early = is_dependent && !me().waited;
  if ((!early && !counts) || bytes == 0 || is_own(place)) return;
  if (early) return fail("memory is read or written before the kernel in front has ended");
  const auto first = reinterpret_cast<uintptr_t>(place) / 32,
             last = (reinterpret_cast<uintptr_t>(place) + bytes - 1) / 32;
  for (uintptr_t sector = first; sector <= last; ++sector) (writes ? written_sectors : read_sectors).insert(sector);
}

void wait_for_kernel_in_front() {
  me().waited = true;
}

float read_shared_of(uint32_t block, const float* own) {
  const uint32_t address = shared_address(own);
  if (block >= blocks.size()) return fail("a read from a block that the cluster does not have"), 0.0f;
  if (block_ended(block)) return fail("a read from the shared memory of a block that has ended"), 0.0f;
  if (is_copied_to(block, address, sizeof(float)))
    return fail("a thread touches what a copy has not brought yet"), 0.0f;
  float value = 0;
  if (const unsigned char* const place = shared_at(block, address, sizeof value, "a read past the shared memory"))
    std::memcpy(&value, place, sizeof value);
  return value;
}

}  // namespace emulation

#define EFFT_ACCESS(bytes)                          \
  void __tsan_read##bytes(void* place) {            \
    emulation::access(place, bytes, false);         \
  }                                                 \
  void __tsan_write##bytes(void* place) {           \
    emulation::access(place, bytes, true);          \
  }                                                 \
  void __tsan_unaligned_read##bytes(void* place) {  \
    emulation::access(place, bytes, false);         \
  }                                                 \
  void __tsan_unaligned_write##bytes(void* place) { \
    emulation::access(place, bytes, true);          \
  }                                                 \
  void __tsan_volatile_read##bytes(void* place) {   \
    emulation::access(place, bytes, false);         \
  }                                                 \
  void __tsan_volatile_write##bytes(void* place) {  \
    emulation::access(place, bytes, true);          \
  }
extern "C" {
EFFT_ACCESS(1)
EFFT_ACCESS(2)
EFFT_ACCESS(4)
EFFT_ACCESS(8)
EFFT_ACCESS(16)
void __tsan_read_range(void* place, size_t bytes) {
  emulation::access(place, bytes, false);
}
void __tsan_write_range(void* place, size_t bytes) {
  emulation::access(place, bytes, true);
}
unsigned char __tsan_atomic8_load(const volatile unsigned char* place, int) {
  return *place;  // used for the initialization of static variables
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

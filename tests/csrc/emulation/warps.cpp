// Emulates the instructions that the lanes of a warp execute together, with the layouts that the PTX manual documents,
// and the asynchronous copies of single threads (cp.async).
#include <algorithm>

#include "machine.h"

namespace emulation {

namespace {

struct Half2 {
  float first, second;
};

template <class T>
Half2 unpack(uint32_t bits) {
  T values[2];
  std::memcpy(values, &bits, sizeof bits);
  return {efft::widen(values[0]), efft::widen(values[1])};
}

// ldmatrix .x4, which loads four matrices of 8x8 elements of 16 bits. Lane 8 i + j passes the address of row j of
// matrix i.
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

// mma.sync.m16n8k16.row.col. Let g = lane / 4 and t = lane % 4.
// - Register i of a contains row g (+ 8 if i is odd), columns 2 t and 2 t + 1 (+ 8 if i >= 2).
// - Register i of b contains rows 2 t and 2 t + 1 (+ 8 if i = 1), column g.
// - Sum i is at row g (+ 8 if i >= 2), column 2 t + i % 2.
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

void copy_async(void* to, const void* from, int bytes) {
  auto* const place = static_cast<unsigned char*>(to);
  unsigned char* const shared = shared_memory();
  if (place < shared || place + 16 > shared + shared_bytes) fail("a copy goes past the shared memory asked for");
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    fail("a copy is not aligned to 16 bytes");
  if (bytes < 0 || bytes > 16) fail("a copy of more than 16 bytes");
  touch_global(from, static_cast<size_t>(std::max(bytes, 0)), false);
  if (failed()) return;
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
    if (lanes[i]->what != lane.what || lanes[i]->number != lane.number)
      return fail("lanes of a warp do different things together"), pause();
  }
  // These two instructions make a warp converge after a branch. All others (`.aligned`) require a converged warp.
  const bool converges = lane.what == Together::sync || lane.what == Together::exchange;
  const uint64_t alone = me().alone;
  for (int i = 0; i < WARP; ++i) {
    if (!converges && threads[first + i].alone != alone)
      return fail("an aligned instruction by a warp that is not converged"), pause();
    threads[first + i].alone = 0;
  }
  const size_t warp = my_warp();
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
      break;
    case Together::product:
      add_product(warp, lanes);
      break;
    case Together::products_fence:
      fence_products(warp);
      break;
    case Together::products_commit:
      commit_products(warp);
      break;
    case Together::products_wait:
      if (products_done(warp, lane.number)) break;
      for (int i = 0; i < WARP; ++i) threads[first + i].state = State::waits_for_products;
      return pause();
    case Together::sync:
    case Together::registers:
    case Together::cluster_arrive:
    case Together::cluster_wait:
      break;
  }
  for (int i = 0; i < WARP; ++i) threads[first + i].state = State::ready;
}

void synchronize_warp() {
  Lane lane{Together::sync};
  together(lane);
}

float exchange(unsigned mask, float value, int other) {
  if (mask != 0xffffffffu) fail("an exchange without the whole warp");
  Lane lane{Together::exchange};
  lane.value = value;
  lane.other = other;
  together(lane);
  return lane.received;
}

}  // namespace emulation

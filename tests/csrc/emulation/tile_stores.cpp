// Emulates bulk stores, which copy tiles from shared memory to tensors in global memory. A store reads shared memory as
// late as possible, when its thread waits until its stores have read. Until then, this memory must not change. The
// store writes global memory at the end of the launch. With EFFT_EMULATION_SEED, both may happen earlier.
#include <algorithm>
#include <deque>

#include "machine.h"

namespace emulation {

namespace {

struct Store {
  TileStore tile;
  size_t thread;
  bool is_committed = false;
  size_t group = 0;  // number of groups that the thread had committed before
};

std::deque<Store> unread;
// Stores that have read shared memory, with the bytes that they have read.
std::vector<std::pair<TileStore, std::vector<unsigned char>>> unwritten;
std::vector<size_t> committed;  // number of groups that each thread has committed

void read(size_t which) {
  const TileStore tile = unread[which].tile;
  unread.erase(unread.begin() + static_cast<std::ptrdiff_t>(which));
  unwritten.emplace_back(tile, bytes_of(tile));
}

}  // namespace

void start_stores() {
  unread.clear();
  committed.assign(threads.size(), 0);
}

void add_store(const TileStore& tile) {
  unread.push_back({tile, running});
}

bool is_stored_from(size_t block, uint32_t address, uint32_t bytes) {
  return std::any_of(unread.begin(), unread.end(), [&](const Store& store) {
    const TileStore& tile = store.tile;
    return tile.block == block && tile.from < address + bytes && address < tile.from + tile.bytes;
  });
}

void commit_stores() {
  for (Store& store : unread)
    if (store.thread == running && !store.is_committed) {
      store.is_committed = true;
      store.group = committed[running];
    }
  ++committed[running];
}

void wait_until_stores_have_read(int newest) {
  me().alone = me().alone * 0x9e3779b97f4a7c15u + 2;
  for (size_t i = 0; i < unread.size();) {
    const Store& store = unread[i];
    const bool is_old = store.is_committed && store.group + static_cast<size_t>(newest) < committed[running];
    if (store.thread == running && is_old)
      read(i);
    else
      ++i;
  }
}

size_t stores_under_way() {
  return static_cast<size_t>(std::count_if(unread.begin(), unread.end(), [](const Store& store) {
    return store.is_committed;
  })) + unwritten.size();
}

void advance_store(size_t which) {
  for (size_t i = 0; i < unread.size(); ++i)
    if (unread[i].is_committed && which-- == 0) return read(i);
  write_tile(unwritten[which].first, unwritten[which].second);
  unwritten.erase(unwritten.begin() + static_cast<std::ptrdiff_t>(which));
}

void end_stores_of_thread() {
  for (const Store& store : unread)
    if (store.thread == running && !store.is_committed) fail("a thread ends with a store that it has not committed");
}

void end_stores_of_block(size_t block) {
  for (const Store& store : unread)
    if (store.tile.block == block) fail("a block ends before a store has read its shared memory");
}

void end_stores(bool succeeded) {
  for (const auto& [tile, bytes] : unwritten)
    if (succeeded) write_tile(tile, bytes);
  unwritten.clear();
}

}  // namespace emulation

// Emulates tensor copies (copies of tiles that a tensor map describes) and st.async, with which a thread sends
// registers to the shared memory of another block. A copy fills its destination with NaN when it starts. The scheduler
// in emulation.cpp decides when it arrives. A multicast arrives in each block at a separate time.
#include <algorithm>

#include "machine.h"

namespace emulation {

namespace {

constexpr uint32_t MOST_DIMENSIONS = 5;

// The content of a tensor map: the arguments of cuTensorMapEncodeTiled.
struct Map {
  const unsigned char* data;
  uint64_t sizes[MOST_DIMENSIONS], strides[MOST_DIMENSIONS - 1];  // sizes in elements, strides in bytes
  uint32_t box[MOST_DIMENSIONS];                                  // sizes of a tile in elements
  uint8_t dimensions, element, swizzle, is_map;  // `element` is in bytes; `is_map` is 1 if the map was encoded
};
static_assert(sizeof(Map) <= 128, "the size of a CUtensorMap");

// A copy that has not arrived: a tile of a tensor, or registers that a thread has sent.
struct Flight {
  Map map;                               // unused if registers are sent
  int column, row;                       // position of the tile in the tensor
  size_t block;                          // destination
  uint32_t to, barrier;                  // addresses in the shared memory of the destination
  std::vector<unsigned char> sent = {};  // content of the registers; empty for a tile

  uint32_t bytes() const {
    return sent.empty() ? map.box[0] * map.box[1] * map.element : static_cast<uint32_t>(sent.size());
  }
};

std::vector<Flight> flights;

// Returns the address at which a byte of a tile is stored. A swizzle of kind n XORs the low n bits of the number of the
// 16-byte chunk with those of the number of the 128-byte line.
uint32_t swizzled(uint32_t address, int kind) {
  return address ^ ((address >> 7 & ((1u << kind) - 1)) << 4);
}

// Calls visit(place, i) for every element of a tile that lies inside the tensor. `place` is its distance from the start
// of the tensor in bytes, and i is its number in the tile.
template <class Visit>
void each_element(const Map& map, int first_column, int first_row, Visit visit) {
  for (uint32_t r = 0; r < map.box[1]; ++r)
    for (uint32_t c = 0; c < map.box[0]; ++c) {
      const int64_t row = int64_t{first_row} + r, column = int64_t{first_column} + c;
      if (row >= 0 && column >= 0 && row < static_cast<int64_t>(map.sizes[1]) &&
          column < static_cast<int64_t>(map.sizes[0]))
        visit(row * static_cast<int64_t>(map.strides[0]) + column * map.element, r * map.box[0] + c);
    }
}

// Counts the rows of a tile that lie inside the tensor.
void touch_tile(const Map& map, int column, int row, bool writes) {
  for (int64_t r = std::max(row, 0); r < std::min<int64_t>(int64_t{row} + map.box[1], map.sizes[1]); ++r) {
    const int64_t first = std::max(column, 0), end = std::min<int64_t>(int64_t{column} + map.box[0], map.sizes[0]);
    if (first < end)
      touch_global(map.data + r * static_cast<int64_t>(map.strides[0]) + first * map.element,
          static_cast<size_t>(end - first) * map.element, writes);
  }
}

}  // namespace

void start_copies() {
  flights.clear();
}

size_t copies_under_way() {
  return flights.size();
}

bool is_copied_to(size_t block, uint32_t address, uint32_t bytes) {
  return std::any_of(flights.begin(), flights.end(), [&](const Flight& flight) {
    return flight.block == block && flight.to < address + bytes && address < flight.to + flight.bytes();
  });
}

void end_copies_of_block(size_t block) {
  for (const Flight& flight : flights)
    if (flight.block == block) fail("a block ends with a copy to it under way");
}

void copy_tile(const void* from, const void* barrier, uint16_t mask, void* to, int column, int row) {
  Map map;
  std::memcpy(&map, from, sizeof map);
  if (map.is_map != 1) return fail("a copy by something that is not a tensor map");
  if (reinterpret_cast<uintptr_t>(from) % 64 != 0) return fail("a tensor map is not aligned to 64 bytes");
  if (map.dimensions != 2) return fail("a copy of two coordinates by a map of another rank");
  if (mask >> blocks.size() != 0) return fail("a multicast to a block that the cluster does not have");
  if (failed()) return;
  touch_tile(map, column, row, false);
  const uint32_t address = shared_address(to), at = shared_address(barrier);
  if (address % 128 != 0) return fail("a copy to a place that is not aligned to 128 bytes");
  for (size_t block = 0; block < blocks.size(); ++block) {
    if (mask == 0 ? block != my_block() : !(mask >> block & 1)) continue;
    const Flight flight{map, column, row, block, address, at, {}};
    unsigned char* const place = shared_at(block, address, flight.bytes(), "a copy goes past the shared memory");
    if (!place) return;
    if (is_copied_to(block, address, flight.bytes())) return fail("two copies under way to the same place");
    if (is_multiplied(block, address, flight.bytes()))
      return fail("a copy overwrites what a product under way still reads");
    if (const size_t writer = unfenced_writer(block, address, flight.bytes()))
      return fail("a copy overwrites what thread " + std::to_string(writer - 1) + " wrote without a proxy fence");
    if (barrier_between(block, address, flight.bytes())) return fail("a copy overwrites a barrier");
    if (is_stored_from(block, address, flight.bytes())) return fail("a copy overwrites what a store has not read yet");
    std::memset(place, 0xff, flight.bytes());
    flights.push_back(flight);
  }
}

void store_tile(const void* to, const void* from, int column, int row) {
  Map map;
  std::memcpy(&map, to, sizeof map);
  if (map.is_map != 1) return fail("a store by something that is not a tensor map");
  if (reinterpret_cast<uintptr_t>(to) % 64 != 0) return fail("a tensor map is not aligned to 64 bytes");
  if (map.dimensions != 2) return fail("a store of two coordinates by a map of another rank");
  const uint32_t address = shared_address(from), bytes = map.box[0] * map.box[1] * map.element;
  if (address % 128 != 0) return fail("a store from a place that is not aligned to 128 bytes");
  if (!shared_at(my_block(), address, bytes, "a store reads past the shared memory")) return;
  if (is_copied_to(my_block(), address, bytes)) return fail("a store reads what a copy has not brought yet");
  if (const size_t writer = unfenced_writer(my_block(), address, bytes))
    return fail("a store reads what thread " + std::to_string(writer - 1) + " wrote without a proxy fence");
  const auto* const first = reinterpret_cast<const unsigned char*>(&map);
  const TileStore tile{{first, first + sizeof map}, column, row, my_block(), address, bytes};
  touch_tile(map, column, row, true);
  add_store(tile);
}

std::vector<unsigned char> bytes_of(const TileStore& tile) {
  const unsigned char* const first = blocks[tile.block].shared + (tile.from - SHARED_BASE);
  return {first, first + tile.bytes};
}

void write_tile(const TileStore& tile, const std::vector<unsigned char>& bytes) {
  Map map;
  std::memcpy(&map, tile.map.data(), sizeof map);
  each_element(map, tile.column, tile.row, [&](int64_t place, uint32_t i) {
    std::memcpy(const_cast<unsigned char*>(map.data) + place,
        bytes.data() + (swizzled(tile.from + i * map.element, map.swizzle) - tile.from), map.element);
  });
}

void send_async(uint32_t block, const uint32_t* values, uint32_t bytes, const void* own, const void* barrier) {
  const uint32_t address = shared_address(own), at = shared_address(barrier);
  if (block >= blocks.size()) return fail("registers sent to a block that the cluster does not have");
  if (block_ended(block)) return fail("registers sent to a block that has ended");
  if (address % bytes != 0) return fail("registers sent to a place that is not aligned to their size");
  unsigned char* const place = shared_at(block, address, bytes, "registers sent past the shared memory");
  if (!place) return;
  if (is_copied_to(block, address, bytes)) return fail("two copies under way to the same place");
  const auto* const first = reinterpret_cast<const unsigned char*>(values);
  std::memset(place, 0xff, bytes);
  flights.push_back({{}, 0, 0, block, address, at, {first, first + bytes}});
}

void check_map(const void* map) {
  if (static_cast<const Map*>(map)->is_map != 1) fail("a prefetch of something that is not a tensor map");
}

void land_copy(size_t which) {
  const Flight flight = flights[which];
  flights.erase(flights.begin() + static_cast<std::ptrdiff_t>(which));
  const Map& map = flight.map;
  uint32_t to = flight.to;
  if (!flight.sent.empty()) {
    std::memcpy(blocks[flight.block].shared + (to - SHARED_BASE), flight.sent.data(), flight.sent.size());
    return complete_bytes(flight.block, flight.barrier, flight.bytes());
  }
  for (uint32_t r = 0; r < map.box[1]; ++r)
    for (uint32_t c = 0; c < map.box[0]; ++c, to += map.element) {
      const int64_t row = int64_t{flight.row} + r, column = int64_t{flight.column} + c;
      unsigned char* const place = blocks[flight.block].shared + (swizzled(to, map.swizzle) - SHARED_BASE);
      const bool exists = row >= 0 && column >= 0 && row < static_cast<int64_t>(map.sizes[1]) &&
                          column < static_cast<int64_t>(map.sizes[0]);
      if (exists)
        std::memcpy(place, map.data + row * static_cast<int64_t>(map.strides[0]) + column * map.element, map.element);
      else
        std::memset(place, 0, map.element);
    }
  complete_bytes(flight.block, flight.barrier, flight.bytes());
}

// Replaces the driver's function. It makes the checks that the CUDA driver's manual lists. It also refuses interleaved
// tensors, fill values other than zero and element strides other than one, which the emulator does not support. The
// integer arguments are the values of the enumerators in cuda.h.
extern "C" __attribute__((visibility("default"))) int cuTensorMapEncodeTiled(void* to, int type, uint32_t dimensions,
    void* data, const uint64_t* sizes, const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
    int interleave, int swizzle, int /*promotion*/, int fill) {
  constexpr int INVALID = 1;
  constexpr int BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  if (type < 0 || type > 9 || dimensions == 0 || dimensions > MOST_DIMENSIONS || interleave != 0 || fill != 0 ||
      swizzle < 0 || swizzle > 3 || reinterpret_cast<uintptr_t>(data) % 16 != 0 || !data)
    return INVALID;
  Map map{};
  map.data = static_cast<const unsigned char*>(data);
  map.dimensions = static_cast<uint8_t>(dimensions);
  map.element = static_cast<uint8_t>(BYTES[type]);
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.is_map = 1;
  const uint32_t inner = box[0] * map.element;
  if (inner % 16 != 0 || (swizzle != 0 && inner > 16u << swizzle)) return INVALID;
  for (uint32_t i = 0; i < dimensions; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256 || steps[i] != 1) return INVALID;
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    if (i == 0) continue;
    const uint64_t stride = strides[i - 1];
    if (stride % 16 != 0 || stride >= uint64_t{1} << 40) return INVALID;
    if (i == 1 && sizes[1] > 1 && stride < sizes[0] * map.element) return INVALID;
    map.strides[i - 1] = stride;
  }
  std::memset(to, 0, 128);
  std::memcpy(to, &map, sizeof map);
  return 0;
}

}  // namespace emulation

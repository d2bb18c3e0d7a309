// Emulates the products of warp groups (wgmma). A warp group consists of four warps, and each warp owns 16 of the 64
// rows. Products are computed as late as possible: when one of the four warps waits for a group of products, and all
// four have committed it. The group is then computed for all four warps. CUTLASS relies on this joint computation
// too: it lets one warp report that the whole warp group no longer reads a buffer. The sums that the threads of a warp
// hold are NaN until that warp itself has waited. The registers and the shared memory that products read must not
// change until the products are computed.
#include <algorithm>
#include <array>
#include <map>

#include "machine.h"

namespace emulation {

namespace {

// A product that a warp has issued.
struct Issued {
  Product product;                              // as issued by the first lane
  std::array<const uint32_t*, WARP> registers;  // the left operand of each lane, or null
  std::array<float*, WARP> sums;                // the sums of each lane
};

// The sums of a warp while products add to them.
struct Sums {
  std::array<float*, WARP> of_lane;
  int columns = 0, under_way = 0;
  size_t last_group = 0;      // index of the last group with a product that adds to these sums
  std::vector<float> values;  // [16, columns]

  // Returns value i of a lane.
  float& at(int lane, int i) {
    const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    return values[static_cast<size_t>(row * columns + column)];
  }
};

struct Warp {
  std::vector<Issued> open;
  std::deque<std::vector<Issued>> groups;
  std::map<float*, Sums> sums;                // by the address of the first lane's sums
  bool is_fenced = false;                     // whether warpgroup_arrive() was called after the last wait for products
  size_t committed = 0;                       // number of committed groups; the last groups.size() are not computed yet
  bool waits = false;                         // whether the warp waits for products
  size_t waits_for = 0;                       // number of groups, from the first one on, that must be computed
  std::vector<std::array<uint64_t, 2>> said;  // descriptors of all products; the four warps must use the same ones
};

std::vector<Warp> warps;
// For each 16 bytes of shared memory of each block: how many operands of products that are not computed yet contain
// them. The products of different warps count separately.
std::vector<uint16_t> readers;
constexpr uint32_t CHUNK = 16;
constexpr size_t IN_GROUP = WARP_GROUP / WARP;

size_t block_of(size_t warp) {
  return warp * WARP / threads_per_block;
}

struct Descriptor {
  uint32_t start, leading, stride, base, swizzle;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base(bits >> 49 & 7),
        // The field contains 0 for no swizzle, or 1, 2, 3 for 128, 64, 32 bytes. The result is the number of address
        // bits that the swizzle changes: 0, or 3, 2, 1.
        swizzle((4 - static_cast<uint32_t>(bits >> 62)) % 4) {}

  // Returns the address of the 16-bit element (i, k). i is a row of a left operand or a column of a right operand, and
  // k < 16.
  uint32_t address(uint32_t i, uint32_t k, bool by_columns) const {
    const uint32_t line = 16u << swizzle;  // number of adjacent bytes
    const uint32_t per_line = line / 2;
    const uint32_t plain = by_columns
                               ? start + i / per_line * leading + i % per_line * 2 + k / 8 * stride + k % 8 * line
                               : start + i / 8 * stride + i % 8 * line + k * 2;
    return plain ^ ((plain >> 7 & ((1u << swizzle) - 1)) << 4);
  }
};

// Calls `visit` for every chunk of 8 adjacent elements that a product reads through a descriptor, in the `count` rows
// or columns from `first` on. Stops if `visit` returns false. `visit` receives the position of the first element, where
// the row or column is counted from `first`, and the address.
template <class Visit>
void each_chunk(uint64_t bits, bool by_columns, int first, int count, Visit visit) {
  const Descriptor descriptor(bits);
  for (int i = 0; i < count; i += by_columns ? 8 : 1)
    for (int k = 0; k < 16; k += by_columns ? 1 : 8)
      if (!visit(i, k, descriptor.address(static_cast<uint32_t>(first + i), static_cast<uint32_t>(k), by_columns)))
        return;
}

// Returns the first of the 64 rows that a warp owns.
int rows_before(size_t warp) {
  return static_cast<int>(warp % IN_GROUP) * 16;
}

template <class Visit>
void each_chunk_of(size_t warp, const Product& product, Visit visit) {
  const auto at = [&](int, int, uint32_t address) { return visit(address); };
  if (!product.registers) each_chunk(product.left, product.left_by_columns, rows_before(warp), 16, at);
  each_chunk(product.right, product.right_by_columns, 0, product.columns, at);
}

size_t chunks_per_block() {
  return (shared_bytes + CHUNK - 1) / CHUNK;
}

size_t chunk_of(size_t block, uint32_t address) {
  return block * chunks_per_block() + (address - SHARED_BASE) / CHUNK;
}

float wide(uint16_t bits, bool is_bf16) {
  return is_bf16 ? efft::widen(efft::bf16{bits}) : efft::widen(efft::fp16{bits});
}

void read_operand(size_t warp, uint64_t bits, bool by_columns, int first, int count, bool is_bf16, float* to,
    int row_stride, int k_stride) {
  each_chunk(bits, by_columns, first, count, [&](int i, int k, uint32_t address) {
    const unsigned char* const place =
        shared_at(block_of(warp), address, CHUNK, "a product reads past the shared memory");
    if (!place) return false;
    --readers[chunk_of(block_of(warp), address)];
    uint16_t values[8];
    std::memcpy(values, place, sizeof values);
    for (int j = 0; j < 8; ++j)
      to[(by_columns ? i + j : i) * row_stride + (by_columns ? k : k + j) * k_stride] = wide(values[j], is_bf16);
    return true;
  });
}

void compute(size_t warp, const Issued& issued) {
  const Product& product = issued.product;
  float left[16][16];
  static float right[16][256];
  if (product.registers) {
    for (int lane = 0; lane < WARP; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int next = 0; next < 2; ++next) {
          const auto bits = static_cast<uint16_t>(issued.registers[lane][i] >> 16 * next);
          left[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8 + next] = wide(bits, product.is_bf16);
        }
  } else {
    read_operand(warp, product.left, product.left_by_columns, rows_before(warp), 16, product.is_bf16, left[0], 16, 1);
  }
  read_operand(warp, product.right, product.right_by_columns, 0, product.columns, product.is_bf16, right[0], 1, 256);
  Sums& sums = warps[warp].sums[issued.sums[0]];
  for (int row = 0; row < 16; ++row) {
    float* const to = sums.values.data() + row * product.columns;
    if (!product.adds) std::fill(to, to + product.columns, 0.0f);
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < product.columns; ++n) to[n] += left[row][k] * right[k][n];
  }
  --sums.under_way;
}

// Writes the sums of the first `groups` groups, for which the warp has waited, to the registers of its lanes.
void write_sums(Warp& warp, size_t groups) {
  for (auto next = warp.sums.begin(); next != warp.sums.end();) {
    Sums& sums = next->second;
    if (sums.under_way > 0 || sums.last_group >= groups) {
      ++next;
      continue;
    }
    for (int lane = 0; lane < WARP; ++lane)
      for (int i = 0; i < sums.columns / 2; ++i) sums.of_lane[lane][i] = sums.at(lane, i);
    next = warp.sums.erase(next);
  }
}

bool can_finish(size_t number) {
  if (!warps[number].waits) return false;
  const auto first = warps.begin() + static_cast<std::ptrdiff_t>(number / IN_GROUP * IN_GROUP);
  return std::all_of(
      first, first + IN_GROUP, [&](const Warp& other) { return other.committed >= warps[number].waits_for; });
}

bool same(const Product& a, const Product& b) {
  return a.is_bf16 == b.is_bf16 && a.columns == b.columns && a.left == b.left && a.right == b.right &&
         a.adds == b.adds && !a.registers == !b.registers;
}

}  // namespace

void start_products() {
  warps.assign(threads.size() / WARP, {});
  readers.assign(blocks.size() * chunks_per_block(), 0);
}

void add_product(size_t number, Lane* const* lanes) {
  Warp& warp = warps[number];
  const Product& product = *lanes[0]->product;
  Issued issued{product, {}, {}};
  for (int i = 0; i < WARP; ++i) {
    if (!same(product, *lanes[i]->product)) return fail("lanes of a warp issue different products");
    issued.registers[i] = lanes[i]->product->registers;
    issued.sums[i] = lanes[i]->product->sums;
  }
  if (product.columns % 8 != 0 || product.columns < 8 || product.columns > 256)
    return fail("a product of an impossible number of columns");
  if (Descriptor(product.right).base != 0) return fail("a descriptor with a base offset, which is not emulated");
  if (!warp.is_fenced) return fail("a product without a fence of the registers before it");
  warp.said.push_back({product.left, product.right});
  for (size_t other = number / IN_GROUP * IN_GROUP; other < (number / IN_GROUP + 1) * IN_GROUP; ++other)
    if (warps[other].said.size() >= warp.said.size() && warps[other].said[warp.said.size() - 1] != warp.said.back())
      return fail("the warps of a group issue different products");
  const size_t block = block_of(number);
  bool fine = true;
  each_chunk_of(number, product, [&](uint32_t address) {
    if (!shared_at(block, address, CHUNK, "a product reads past the shared memory")) return fine = false;
    if (is_copied_to(block, address, CHUNK)) fail("a product reads what a copy has not brought yet"), fine = false;
    if (const size_t writer = unfenced_writer(block, address, CHUNK))
      fail("a product reads what thread " + std::to_string(writer - 1) + " wrote without a proxy fence"), fine = false;
    ++readers[chunk_of(block, address)];
    return fine;
  });
  if (!fine) return;
  // Whether other products add to the same sums and the warp has not waited for them yet.
  const bool are_here = warp.sums.count(issued.sums[0]) != 0;
  Sums& sums = warp.sums[issued.sums[0]];
  ++sums.under_way;
  if (!are_here) {
    sums.of_lane = issued.sums;
    sums.columns = product.columns;
    sums.values.resize(static_cast<size_t>(16 * product.columns));
    for (int lane = 0; lane < WARP; ++lane)
      for (int i = 0; i < product.columns / 2; ++i) {
        sums.at(lane, i) = issued.sums[lane][i];
        issued.sums[lane][i] = NAN;
      }
  } else if (sums.columns != product.columns) {
    return fail("products of different shapes add to the same sums at once");
  }
  sums.last_group = warp.committed;
  warp.open.push_back(issued);
}

void commit_products(size_t warp) {
  warps[warp].groups.push_back(std::move(warps[warp].open));
  warps[warp].open.clear();
  ++warps[warp].committed;
}

void fence_products(size_t warp) {
  warps[warp].is_fenced = true;
}

bool products_done(size_t number, int under_way) {
  Warp& warp = warps[number];
  warp.is_fenced = false;  // from now on, the threads may change the registers
  const size_t groups = warp.committed - std::min(warp.committed, static_cast<size_t>(under_way));
  if (warp.committed - warp.groups.size() >= groups) {
    write_sums(warp, groups);
    return true;
  }
  warp.waits = true;
  warp.waits_for = groups;
  return false;
}

size_t products_waited_for() {
  size_t count = 0;
  for (size_t number = 0; number < warps.size(); ++number) count += can_finish(number);
  return count;
}

void finish_products(size_t which) {
  size_t number = 0;
  for (; number < warps.size(); ++number)
    if (can_finish(number) && which-- == 0) break;
  Warp& warp = warps[number];
  for (size_t other = number / IN_GROUP * IN_GROUP; other < (number / IN_GROUP + 1) * IN_GROUP; ++other)
    while (warps[other].committed - warps[other].groups.size() < warp.waits_for) {
      for (const Issued& issued : warps[other].groups.front()) compute(other, issued);
      warps[other].groups.pop_front();
    }
  write_sums(warp, warp.waits_for);
  warp.waits = false;
  for (size_t i = number * WARP; i < (number + 1) * WARP; ++i) threads[i].state = State::ready;
}

bool is_multiplied(size_t block, uint32_t address, uint32_t bytes) {
  if (bytes == 0) return false;
  const auto first = readers.begin() + static_cast<std::ptrdiff_t>(chunk_of(block, address));
  const auto last = readers.begin() + static_cast<std::ptrdiff_t>(chunk_of(block, address + bytes - 1));
  return std::any_of(first, last + 1, [](uint16_t count) { return count > 0; });
}

void end_products_of_thread() {
  const Warp& warp = warps[my_warp()];
  const bool open = std::any_of(warp.groups.begin(), warp.groups.end(), [](const auto& g) { return !g.empty(); });
  if (open || !warp.open.empty()) fail("a thread ends with products under way");
}

void multiply_async(const Product& product) {
  Lane lane{Together::product};
  lane.product = &product;
  together(lane);
}
void fence_products() {
  Lane lane{Together::products_fence};
  together(lane);
}
void commit_products() {
  Lane lane{Together::products_commit};
  together(lane);
}
void wait_products(int under_way) {
  Lane lane{Together::products_wait};
  lane.number = under_way;
  together(lane);
}

void set_registers(int count) {
  Lane lane{Together::registers};
  lane.number = count;
  together(lane);
  if (count % 8 != 0 || count < 24 || count > 256) return fail("an impossible number of registers");
  me().registers = count;
  // The sum has one thread for each warp group. Groups that have not called this function yet count as 0, because they
  // may still release registers.
  int sum = 0;
  for (size_t i = my_block() * threads_per_block; i < (my_block() + 1) * threads_per_block; i += WARP_GROUP)
    sum += threads[i].registers;
  // A block starts with the same multiple of 8 registers for each thread, and its groups share them from then on.
  const size_t at_start = 65536 / threads_per_block / 8 * 8;
  if (static_cast<size_t>(sum) > at_start * threads_per_block / WARP_GROUP)
    fail("the warp groups ask for more registers than there are");
}

}  // namespace emulation

// Products of warp groups, of which each warp has 16 rows. What one of the four warps commits is complete once all four
// have issued it and it is done for all of them: CUTLASS, too, lets one warp say that a group is done with a buffer.
// Products are computed when a warp waits for them, as late as can be; until a warp has waited itself, the sums that its
// threads hold are NaN, and until the products are computed, registers and shared memory must stay as they are.
#include <algorithm>
#include <array>
#include <map>

#include "machine.h"

namespace emulation {

namespace {

// A product that a warp has issued.
struct Issued {
  Product product;  // of its first lane
  std::array<const uint32_t*, WARP> registers;
  std::array<float*, WARP> sums;
};

// The sums of a warp while products add to them.
struct Sums {
  std::array<float*, WARP> of_lane;
  int columns = 0, under_way = 0;
  size_t last_group = 0;  // of products that add to them
  std::vector<float> values;  // [16, columns]

  // Where value i of a lane lies.
  float& at(int lane, int i) {
    const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    return values[static_cast<size_t>(row * columns + column)];
  }
};

struct Warp {
  std::vector<Issued> open;
  std::deque<std::vector<Issued>> groups;
  std::map<float*, Sums> sums;  // by the first lane's
  bool is_fenced = false;       // since the registers of the last products could be touched
  size_t committed = 0;         // groups, of which the last groups.size() are not computed yet
  bool waits = false;
  size_t waits_for = 0;  // groups, from the first on
  std::vector<std::array<uint64_t, 2>> said;  // descriptors, which must be the same in the four warps of a group
};

std::vector<Warp> warps;
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
        // None, 128 bytes, 64, 32; the number of exchanged bits.
        swizzle((4 - static_cast<uint32_t>(bits >> 62)) % 4) {}

  // Of element (i, k) of 16 bits, i of the rows of a left or the columns of a right operand, k < 16.
  uint32_t address(uint32_t i, uint32_t k, bool by_columns) const {
    const uint32_t line = 16u << swizzle;  // bytes that lie side by side
    const uint32_t per_line = line / 2;
    const uint32_t plain =
        by_columns ? start + i / per_line * leading + i % per_line * 2 + k / 8 * stride + k % 8 * line
                   : start + i / 8 * stride + i % 8 * line + k * 2;
    return plain ^ ((plain >> 7 & ((1u << swizzle) - 1)) << 4);
  }
};

// Every run of 8 elements, of the `count` rows or columns from `first` on, that a product reads by a descriptor.
template <class Visit>
void each_chunk(uint64_t bits, bool by_columns, int first, int count, Visit visit) {
  const Descriptor descriptor(bits);
  for (int i = 0; i < count; i += by_columns ? 8 : 1)
    for (int k = 0; k < 16; k += by_columns ? 1 : 8)
      if (!visit(i, k, descriptor.address(static_cast<uint32_t>(first + i), static_cast<uint32_t>(k), by_columns)))
        return;
}

int rows_before(size_t warp) {
  return static_cast<int>(warp % IN_GROUP) * 16;
}

template <class Visit>
void each_chunk_of(size_t warp, const Product& product, Visit visit) {
  const auto at = [&](int, int, uint32_t address) { return visit(address); };
  if (!product.registers) each_chunk(product.left, product.left_by_columns, rows_before(warp), 16, at);
  each_chunk(product.right, product.right_by_columns, 0, product.columns, at);
}

float wide(uint16_t bits, bool is_bf16) {
  return is_bf16 ? efft::widen(efft::bf16{bits}) : efft::widen(efft::fp16{bits});
}

void read_operand(size_t warp, uint64_t bits, bool by_columns, int first, int count, bool is_bf16, float* to,
    int row_stride, int k_stride) {
  each_chunk(bits, by_columns, first, count, [&](int i, int k, uint32_t address) {
    const unsigned char* const place = shared_at(block_of(warp), address, 16, "a product reads past the shared memory");
    if (!place) return false;
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
    read_operand(
        warp, product.left, product.left_by_columns, rows_before(warp), 16, product.is_bf16, left[0], 16, 1);
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

// Gives a warp the sums of the groups that it has waited for.
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
    if (!shared_at(block, address, 16, "a product reads past the shared memory")) return fine = false;
    if (is_copied_to(block, address, 16)) fail("a product reads what a copy has not brought yet"), fine = false;
    if (const size_t writer = unfenced_writer(block, address, 16))
      fail("a product reads what thread " + std::to_string(writer - 1) + " wrote without a proxy fence"), fine = false;
    return fine;
  });
  if (!fine) return;
  const bool are_here = warp.sums.count(issued.sums[0]) != 0;  // still, or computed and not waited for yet
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
  warp.is_fenced = false;  // the registers may be touched from here on
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
  bool found = false;
  for (size_t number = block * threads_per_block / WARP; number < (block + 1) * threads_per_block / WARP; ++number) {
    const auto look = [&](const Issued& issued) {
      each_chunk_of(number, issued.product, [&](uint32_t at) {
        found = found || (at < address + bytes && address < at + 16);
        return !found;
      });
    };
    for (const auto& group : warps[number].groups) std::for_each(group.begin(), group.end(), look);
    std::for_each(warps[number].open.begin(), warps[number].open.end(), look);
  }
  return found;
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
  int sum = 0;  // of one thread per warp group; those that have not asked yet may still give registers back
  for (size_t i = my_block() * threads_per_block; i < (my_block() + 1) * threads_per_block; i += WARP_GROUP)
    sum += threads[i].registers;
  if (sum > 65536 / WARP_GROUP) fail("the warp groups ask for more registers than there are");
}

}  // namespace emulation

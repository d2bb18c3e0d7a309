// Defines the order in which blocks compute tiles, and the thread that copies the operands of each step along k into a
// ring of buffers. The products of all generations for compute capability 9.0 use these parts.
#pragma once

#include <cstring>

#include "instructions.cuh"
#include "launch.h"
#include "product_sm90.cuh"  // before headers that use only CUDA, because CuTe must come first

namespace efft {

// In each column of tiles (or of pairs of tiles), the blocks compute 2 * ROWS_IN_L2 rows of tiles before they continue
// with the next column, so that the operands of these tiles stay in the L2 cache.
constexpr int64_t ROWS_IN_L2 = 8;

// Describes how the output is divided into pairs of tiles, and the product of a tile into steps. The pairs of blocks
// compute the pairs of tiles in turn, and each block of a pair computes one of the two tiles.
struct Tiles {
  int rows, columns;      // number of rows and columns of pairs of tiles in the output
  int main_steps, steps;  // number of steps for A B, and for A B and the tail together
  int last_depth;         // depth of the last step of the tail, in units of 16 columns of H

  template <class P>
  static Tiles of(const LowRankGemm& op) {
    const auto blocks = [](int64_t size, int64_t block) { return static_cast<int>(ceil_div(size, block)); };
    const int main_steps = blocks(op.K, typename P::K{});
    return {blocks(op.M, (P::SHARES_H ? 1 : PAIR) * typename P::M{}),
        blocks(op.N, (P::SHARES_H ? PAIR : 1) * typename P::N{}), main_steps,
        main_steps + blocks(op.R, typename P::K{}), (blocks(op.R, 16) - 1) % 4 + 1};
  }
  __host__ __device__ int count() const { return rows * columns; }
  // Sets m and n to the row and the column, counted in tiles, of this block's tile. `tile` is the number of the pair of
  // tiles.
  template <class P>
  __device__ void place(int tile, int& m, int& n) const {
    constexpr int group = static_cast<int>(P::SHARES_H ? PAIR * ROWS_IN_L2 : ROWS_IN_L2);
    const int first = tile / (group * columns) * group, rank = static_cast<int>(block_rank_in_cluster());
    const int height = min(rows - first, group), within = tile % (group * columns);
    m = first + within % height;
    n = within / height;
    (P::SHARES_H ? n : m) = PAIR * (P::SHARES_H ? n : m) + rank;
  }
};

// A position in the ring of buffers, and the parity of the number of rounds that are completed. The barriers of the
// buffers distinguish successive rounds by this parity.
struct RingPlace {
  int stage = 0;
  uint32_t round = 0;

  __device__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      round ^= 1;
    }
  }
  // Moves past the buffers of `steps` steps, which another warp group reads.
  __device__ void skip(int steps) {
    stage += steps;
    round ^= static_cast<uint32_t>(stage / STAGES % 2);
    stage %= STAGES;
  }
};

// Prefetches the tensor maps into their cache. This is allowed before the previous kernel has ended, because the maps
// are parameters of this kernel, which no other kernel writes.
template <class P>
__device__ void prefetch_maps(const Operands<P>& from) {
  prefetch_tensor_map(from.A.get_tma_descriptor());
  prefetch_tensor_map(from.B.get_tma_descriptor());
  prefetch_tensor_map(from.T.get_tma_descriptor());
  prefetch_tensor_map(P::RANKS > 0 ? from.factor.get_tma_descriptor() : from.H.get_tma_descriptor());
}

// Copies the operands of every step of this block's tiles into the ring of buffers. One thread calls this function.
// `stride` is the number of pairs of blocks.
template <class P>
__device__ void copy_tiles(
    const Operands<P>& from, const LowRankGemm& op, const Tiles& tiles, int stride, typename P::Shared& shared) {
  const Tensor a = make_tensor(make_smem_ptr(shared.a.data()), typename P::LayoutA{});
  const Tensor b = make_tensor(make_smem_ptr(shared.b.data()), typename P::LayoutB{});
  const uint32_t rank = block_rank_in_cluster();
  const auto part_a = from.A.get_slice(P::SHARES_H ? rank : 0);
  const auto part_h = from.H.get_slice(0);
  const auto part_b = from.B.get_slice(P::SHARES_H ? 0 : rank), part_t = from.T.get_slice(P::SHARES_H ? 0 : rank);
  const auto cut = [](const auto& copy, const auto& part, int outer, int depth, auto block, int index) {
    return part.partition_S(local_tile(copy.get_tma_tensor(make_shape(outer, depth)), block, make_coord(index, _)));
  };
  constexpr uint16_t both = 3;
  const int M = static_cast<int>(op.M), N = static_cast<int>(op.N), K = static_cast<int>(op.K),
            R = static_cast<int>(op.R);
  const Shape<typename P::M, typename P::K> block_a;
  const Shape<typename P::N, typename P::K> block_b;
  auto to_a = part_a.partition_D(a);
  auto to_h = part_h.partition_D(a);
  auto to_b = part_b.partition_D(b);
  // Returns a copy of B, T or P to both blocks of the pair or, if each block computes half of H, only to this block.
  const auto shared_copy = [&](const auto& copy, uint64_t& barrier) {
    if constexpr (P::SHARES_H)
      return copy.with(barrier);
    else
      return copy.with(barrier, both);
  };

  RingPlace place;
  for (int tile = static_cast<int>(blockIdx.x) / PAIR; tile < tiles.count(); tile += stride) {
    int m, n;
    tiles.template place<P>(tile, m, n);
    const auto from_a = cut(from.A, part_a, M, K, block_a, m);
    const auto from_h = cut(from.H, part_h, M, R, block_a, m);
    const auto from_b = cut(from.B, part_b, N, K, block_b, n);
    const auto from_t = cut(from.T, part_t, N, R, block_b, n);
    for (int step = 0; step < tiles.steps; ++step, place.next()) {
      const int stage = place.stage;
      shared.empty[stage].wait(place.round ^ 1);
      auto& full = shared.full[stage];
      uint64_t& barrier = *reinterpret_cast<uint64_t*>(&full);
      if (step < tiles.main_steps) {
        full.arrive_and_expect_tx(P::BYTES_A + P::BYTES_B + P::BYTES_P);
        if constexpr (P::SHARES_H)
          copy(from.A.with(barrier, both), from_a(_, _, _, step), to_a(_, _, _, stage));
        else
          copy(from.A.with(barrier), from_a(_, _, _, step), to_a(_, _, _, stage));
        copy(shared_copy(from.B, barrier), from_b(_, _, _, step), to_b(_, _, _, stage));
        if constexpr (P::RANKS > 0) {
          const Tensor p = make_tensor(make_smem_ptr(shared.p.data()), typename P::LayoutP{});
          const auto part_p = from.factor.get_slice(P::SHARES_H ? 0 : rank);
          const int half = P::SHARES_H ? static_cast<int>(rank) : 0;
          const auto from_p = cut(from.factor, part_p, R, K, Shape<typename P::R, typename P::K>{}, half);
          auto to_p = part_p.partition_D(p);
          copy(shared_copy(from.factor, barrier), from_p(_, _, _, step), to_p(_, _, _, stage));
        }
      } else {
        full.arrive_and_expect_tx(P::RANKS > 0 ? P::BYTES_B : P::BYTES_A + P::BYTES_B);
        if (P::RANKS == 0) copy(from.H.with(barrier), from_h(_, _, _, step - tiles.main_steps), to_h(_, _, _, stage));
        copy(shared_copy(from.T, barrier), from_t(_, _, _, step - tiles.main_steps), to_b(_, _, _, stage));
      }
    }
  }
}

// Returns the tensor maps of a product.
template <class P>
Operands<P> operands_of(const LowRankGemm& op) {
  const int M = static_cast<int>(op.M), N = static_cast<int>(op.N), K = static_cast<int>(op.K),
            R = static_cast<int>(op.R);
  // Without P, the map of the factor is not used, but it must still describe a tensor that the driver accepts.
  return {P::copy_left(op.A, M, K), P::copy_a(op.H, M, R), P::copy_b(op.B, N, K), P::copy_b(op.T, N, R),
      P::RANKS > 0 ? P::copy_p(op.P, R, K) : P::copy_p(op.H, M, R)};
}

// Returns whether the driver has accepted a tensor map. It leaves the map of a tensor that it rejects empty.
inline bool is_encoded(const TmaDescriptor* map) {
  const TmaDescriptor none{};
  return std::memcmp(map, &none, sizeof(none)) != 0;
}

template <class P>
bool are_encoded(const Operands<P>& from) {
  return is_encoded(from.A.get_tma_descriptor()) && is_encoded(from.H.get_tma_descriptor()) &&
         is_encoded(from.B.get_tma_descriptor()) && is_encoded(from.T.get_tma_descriptor()) &&
         is_encoded(from.factor.get_tma_descriptor());
}

}  // namespace efft

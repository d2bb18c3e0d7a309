// Computes C[i, j] = init[i, j] + sum over k of A[i, k] B[k, j], without packing, for products with one small
// dimension.
//
// One register tile serves the three shapes of a low-rank update (the product is [M, N], summed over K):
//   h = x D, dh = gy G^T    N = rank:    B is a panel of the factor
//   y = base + b + h G, dx = base + dh D^T    K = rank:    C is written in the same pass
//   dG = h^T gy, dD^T = dh^T x    M = rank, K = tokens:    A is read across its rows
// Therefore A has two strides, B and C have contiguous rows, and init may be a matrix other than C, a bias, or both.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"

namespace efft::EFFT_ISA {

constexpr int TILE_ROWS = LANES == 16 ? 8 : 4;  // rows of accumulators; see TILE_LANES
// Registers per row. TILE_ROWS * TILE_LANES accumulators, TILE_LANES registers of B and one of A fit in the register
// file.
constexpr int TILE_LANES = 3;
constexpr int64_t TILE_COLUMNS = int64_t{TILE_LANES} * LANES;
// The number of rows of a product that are computed together, if the product has that many.
#if defined(__AMX_BF16__)
template <class E>
constexpr int64_t ROWS_TOGETHER = std::is_same_v<E, bf16> ? 32 : TILE_ROWS;
#else
template <class E>
constexpr int64_t ROWS_TOGETHER = TILE_ROWS;
#endif
// The number of rows of B (pairs of rows in bf16) per block, chosen so that 32 columns of them fit in the first-level
// cache.
constexpr int64_t BLOCK_K = 192;

// Strides are in elements. Element (i, k) of A is at i * row + k * step. In bf16, where pairs of k are adjacent, `step`
// is the distance between pairs.
template <class E>
struct Operand {
  const E* data;
  int64_t row;
  int64_t step;
};

template <class T>
struct Rows {
  T* data;
  int64_t row;
};

// The initial value of a product: a matrix, plus a bias for every row. Either may be absent.
template <class T>
struct Base {
  const T* data = nullptr;
  int64_t row = 0;
  const float* bias = nullptr;

  Base from(int64_t i, int64_t j) const {
    return {data ? data + i * row + j : nullptr, row, bias ? bias + j : nullptr};
  }
};

// Memory that the inner loop prefetches. The address advances by `step` bytes per iteration over k, because requesting
// all of the memory at once would delay the arithmetic.
struct Ahead {
  const char* at = nullptr;
  int64_t step = 0;
};

// Plans the prefetch of `bytes` bytes from `from` on, spread over the iterations of a product [rows, columns, depth].
template <class E>
Ahead ahead_of(const void* from, int64_t bytes, int64_t rows, int64_t columns, int64_t depth) {
  const int64_t tiles = ((rows + TILE_ROWS - 1) / TILE_ROWS) * ((columns + TILE_COLUMNS - 1) / TILE_COLUMNS);
  const int64_t steps = std::max<int64_t>(tiles * (depth / TOGETHER<E>), 1);
  return {static_cast<const char*>(from), std::min<int64_t>(bytes / steps, 64)};
}

// Computes sums += left * right lane by lane. In bf16, every lane holds a pair.
inline void multiply(float, Floats& sums, Floats left, Floats right) {
  sums += left * right;
}
#if defined(__AVX512BF16__)
inline void multiply(bf16, Floats& sums, Floats left, Floats right) {
  sums = (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
}
#endif

// Copies one element to every lane. In bf16 the element is a pair; if the depth is odd, the second element of the last
// pair is zero.
EFFT_INLINE Floats spread(const float* from, bool) {
  return splat(*from);
}
EFFT_INLINE Floats spread(const bf16* from, bool is_whole) {
  uint32_t pair = 0;
  std::memcpy(&pair, from, is_whole ? 4 : 2);
  return (Floats)(Bits{} + pair);
}

// Rows of pairs are padded, so all lanes may be read.
EFFT_INLINE Floats row_of_right(const float* from, int count) {
  return load(from, count);
}
EFFT_INLINE Floats row_of_right(const bf16* from, int) {
  return load(reinterpret_cast<const float*>(from));
}

// If WHOLE is false, `last` is the number of valid lanes in the last register.
template <int M, int N, bool WHOLE, class E, class Init, class Out>
void tile(int64_t depth, Operand<E> A, Rows<const E> B, Base<Init> init, Rows<Out> C, int last, Ahead ahead) {
  const auto lanes = [last](int64_t j) { return WHOLE || j < N - 1 ? LANES : last; };
  Floats sums[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < N; ++j) sums[i][j] = Floats{};
  const auto step = [&](int64_t k, bool is_whole) {
    const E* b = B.data + k * B.row;
    Floats right[N];
#pragma GCC unroll 3
    for (int64_t j = 0; j < N; ++j) right[j] = row_of_right(b + j * LANES * TOGETHER<E>, lanes(j));
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Floats left = spread(A.data + i * A.row + k * A.step, is_whole);
#pragma GCC unroll 3
      for (int j = 0; j < N; ++j) multiply(E{}, sums[i][j], left, right[j]);
    }
  };
  const int64_t steps = depth / TOGETHER<E>;
  for (int64_t k = 0; k < steps; ++k) {
    __builtin_prefetch(ahead.at + k * ahead.step, 0, 2);
    step(k, true);
  }
  if (depth % TOGETHER<E> != 0) step(steps, false);
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < N; ++j) {
      if (init.data) sums[i][j] += load(init.data + i * init.row + j * LANES, lanes(j));
      if (init.bias) sums[i][j] += load(init.bias + j * LANES, lanes(j));
      store(C.data + i * C.row + j * LANES, sums[i][j], lanes(j));
    }
}

template <int M, int N, class E, class Init, class Out>
inline void down_rows(
    int64_t rows, int64_t depth, Operand<E> A, Rows<const E> B, Base<Init> init, Rows<Out> C, int last, Ahead& ahead) {
  int64_t i = 0;
  for (; i + M <= rows; i += M) {
    const Base<Init> from = init.from(i, 0);
    const Operand<E> a{A.data + i * A.row, A.row, A.step};
    const Rows<Out> to{C.data + i * C.row, C.row};
    if (last == LANES)
      tile<M, N, true>(depth, a, B, from, to, last, ahead);
    else
      tile<M, N, false>(depth, a, B, from, to, last, ahead);
    ahead.at += depth / TOGETHER<E> * ahead.step;
  }
  if constexpr (M > 1) {
    if (i == rows) return;
    down_rows<M / 2, N>(rows - i, depth, Operand<E>{A.data + i * A.row, A.row, A.step}, B, init.from(i, 0),
        Rows<Out>{C.data + i * C.row, C.row}, last, ahead);
  }
}

// If C contains floats, depth is processed in blocks, and partial sums are stored in C.
template <class E, class Init, class Out>
void product(int64_t rows, int64_t columns, int64_t depth, Operand<E> A, Rows<const E> B, Base<Init> init, Rows<Out> C,
    Ahead& ahead) {
  const auto tiles = [&](int64_t width, int64_t size, Operand<E> a, Rows<const E> b, auto from, Rows<Out> to) {
    const int last = static_cast<int>(width % LANES ? width % LANES : LANES);
    if (width > TILE_COLUMNS - LANES)
      down_rows<TILE_ROWS, 3>(rows, size, a, b, from, to, last, ahead);
    else if (width > LANES)
      down_rows<TILE_ROWS, 2>(rows, size, a, b, from, to, last, ahead);
    else
      down_rows<TILE_ROWS, 1>(rows, size, a, b, from, to, last, ahead);
  };
  const int64_t block = std::is_same_v<Out, float> ? BLOCK_K * TOGETHER<E> : std::max<int64_t>(depth, 1);
  for (int64_t k = 0; k == 0 || k < depth; k += block)
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
      const int64_t size = std::min(block, depth - k), width = std::min(TILE_COLUMNS, columns - j);
      const Operand<E> a{A.data + k / TOGETHER<E> * A.step, A.row, A.step};
      const Rows<const E> b{B.data + k / TOGETHER<E> * B.row + j * TOGETHER<E>, B.row};
      const Rows<Out> to{C.data + j, C.row};
      if (k == 0)
        tiles(width, size, a, b, init.from(0, j), to);
      else
        tiles(width, size, a, b, Base<Out>{to.data, to.row}, to);
    }
}

template <class E, class Init, class Out>
void product(
    int64_t rows, int64_t columns, int64_t depth, Operand<E> A, Rows<const E> B, Base<Init> init, Rows<Out> C) {
  Ahead nothing;
  product(rows, columns, depth, A, B, init, C, nothing);
}

// Interleaves the rows of `from` in pairs, for E = bf16. Row p of the result [ceil(rows / 2), width, 2] contains rows
// 2p and 2p + 1. Elements beyond the last row or column are zero. `width` must be a multiple of LANES.
template <class From>
Rows<const bf16> interleave(Rows<const From> from, int64_t rows, int64_t columns, int64_t width, bf16* to) {
  for (int64_t i = 0; i < rows; i += 2) {
    const From* even = from.data + i * from.row;
    const From* odd = i + 1 < rows ? even + from.row : nullptr;
    bf16* pairs = to + i * width;
    for_registers(columns, [&](int64_t j, int count) {
      Bits of = load_bits(even + j, count);
      if (odd) of |= load_bits(odd + j, count) << 16;
      std::memcpy(pairs + 2 * j, &of, sizeof of);
    });
    const int64_t filled = (columns + LANES - 1) / LANES * LANES;
    std::memset(pairs + 2 * filled, 0, 4 * (width - filled));
  }
  return {to, 2 * width};
}

}  // namespace efft::EFFT_ISA

// Computes products in which one dimension is small: C[i, j] = init[i, j] + sum over k of A[i, k] B[k, j]. C is [M, N],
// A is [M, K], and B is [K, N].
//
// The products of a low-rank update have three shapes, which the same code computes:
//   h = x D, dh = gy G^T                    N is the rank, and B is a panel of the factor (see kernels.h)
//   y = base + b + h G, dx = base + dh D^T  K is the rank; base and the bias b are added while C is written
//   dG = h^T gy, dD^T = dh^T x              M is the rank and K the number of tokens; A is a transposed matrix
// Therefore A may have any stride in both dimensions, whereas the rows of B and C are contiguous. init may be a matrix,
// a bias, or both.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lanes.h"

namespace efft::EFFT_ISA {

// The sums of a tile of C are in registers: TILE_ROWS rows of TILE_LANES registers. These sums, TILE_LANES registers of
// B and one register of A fit in the registers of the processor.
constexpr int TILE_ROWS = LANES == 16 ? 8 : 4;
constexpr int TILE_LANES = 3;
constexpr int64_t TILE_COLUMNS = int64_t{TILE_LANES} * LANES;
// The number of rows of C that are computed together, if C has that many.
#if defined(__AMX_BF16__)
template <class E>
constexpr int64_t ROWS_TOGETHER = std::is_same_v<E, bf16> ? 32 : TILE_ROWS;
#else
template <class E>
constexpr int64_t ROWS_TOGETHER = TILE_ROWS;
#endif
// The number of steps of k (of pairs of steps for bf16) after which the sums are stored. It is chosen so that 32
// columns of as many rows of B fit in the first-level cache.
constexpr int64_t BLOCK_K = 192;

// The left operand A. Strides are in elements. For floats, element (i, k) is at i * row + k * step. For bf16, the
// elements (i, 2 p) and (i, 2 p + 1) are adjacent, and this pair begins at i * row + p * step.
template <class E>
struct Operand {
  const E* data;
  int64_t row;
  int64_t step;
};

// A matrix whose rows are contiguous; `row` is the distance between rows, in elements.
template <class T>
struct Rows {
  T* data;
  int64_t row;
};

// The initial value of a product: a matrix, plus a bias that is added to every row. Both may be absent (null).
template <class T>
struct Base {
  const T* data = nullptr;
  int64_t row = 0;
  const float* bias = nullptr;

  // Returns the part of the initial value that begins at element (i, j).
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

// Computes sums += left * right lane by lane. For bf16, every lane of left and right contains a pair, and the products
// of both elements are added.
inline void multiply(float, Floats& sums, Floats left, Floats right) {
  sums += left * right;
}
#if defined(__AVX512BF16__)
inline void multiply(bf16, Floats& sums, Floats left, Floats right) {
  sums = (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
}
#endif

// Returns a register with the element of A at `from` in every lane. For bf16, every lane contains the pair at `from`.
// If the depth is odd, the last pair is not whole: it has no second element, and zero is used instead.
EFFT_INLINE Floats spread(const float* from, bool) {
  return splat(*from);
}
EFFT_INLINE Floats spread(const bf16* from, bool is_whole) {
  uint32_t pair = 0;
  std::memcpy(&pair, from, is_whole ? 4 : 2);
  return (Floats)(Bits{} + pair);
}

// Loads `count` elements of a row of B. For bf16, it loads pairs; rows of pairs are padded, so all lanes may be read.
EFFT_INLINE Floats row_of_right(const float* from, int count) {
  return load(from, count);
}
EFFT_INLINE Floats row_of_right(const bf16* from, int) {
  return load(reinterpret_cast<const float*>(from));
}

// Computes a tile of C that has M rows of N registers. If WHOLE is false, only the first `last` lanes of the last
// register of a row belong to C.
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

// Computes all rows of C for N registers of columns, of which the last register has `last` valid lanes. It uses tiles
// of M rows, and smaller tiles for the remaining rows.
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

// Computes C [rows, columns] = init + A B, where `depth` is the length of the sums, and advances `ahead`. If C contains
// floats, the sums are computed in blocks of BLOCK_K steps, and C contains partial sums in between.
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

// Interleaves the rows of `from` [rows, columns] in pairs, as products of bf16 need them. Row p of the result
// [ceil(rows / 2), width, 2] contains rows 2 p and 2 p + 1. Elements beyond the last row or column are zero. `width`
// must be a multiple of LANES.
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

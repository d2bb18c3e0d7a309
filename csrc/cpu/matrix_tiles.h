// Implements the product of product.h for bf16 with matrix registers (AMX), if the instruction set has them. A matrix
// register contains a tile of 16 rows of 64 bytes. All products use the same configuration of the registers, because
// operands that fill only a part of a tile are padded with zeros.
#pragma once

#include "buffer.h"
#include "product.h"

namespace efft::EFFT_ISA {

// Configures the matrix registers of the calling thread for the lifetime of the object, if products of E use them.
template <class E>
class MatrixRegisters {};

#if defined(__AMX_BF16__)

constexpr int64_t TILE = 16;  // number of rows of a tile, and of its columns of 32 bits: floats or pairs of bf16
constexpr int64_t TILE_K = 2 * TILE;  // number of bf16 elements in a row of a tile

template <>
class MatrixRegisters<bf16> {
 public:
  MatrixRegisters() {
    struct Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
    };
    static constexpr Configuration all_whole;
    __asm__ volatile("ldtilecfg %0" ::"m"(all_whole));
  }
  MatrixRegisters(const MatrixRegisters&) = delete;
  MatrixRegisters& operator=(const MatrixRegisters&) = delete;
  ~MatrixRegisters() { __asm__ volatile("tilerelease"); }
};

// Loads a tile, whose rows are `row` elements apart, into a matrix register. This is an asm statement, because GCC's
// intrinsics do not declare that a load reads memory.
template <int REGISTER>
EFFT_INLINE void load_tile(const bf16* from, int64_t row) {
  const int64_t bytes = row * static_cast<int64_t>(sizeof(bf16));
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(REGISTER) : "memory");
}

template <int REGISTER>
EFFT_INLINE void store_tile(float* to, int64_t row) {  // NOLINT(readability-non-const-parameter)
  const int64_t bytes = row * static_cast<int64_t>(sizeof(float));
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(REGISTER) : "memory");
}

template <int REGISTER>
EFFT_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(REGISTER));
}

template <int SUMS, int LEFT, int RIGHT>
EFFT_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

// Loads a partial tile, which has `rows` rows (at most 16 are used) of `elements` elements, and pads it with zeros. It
// does not read beyond the last element. Each row is copied with one masked load, because most products of small rank
// have only partial tiles.
template <int REGISTER>
void load_part(const bf16* from, int64_t row, int64_t rows, int64_t elements) {
  alignas(64) bf16 whole[TILE][TILE_K];
  const auto mask = static_cast<__mmask32>((int64_t{1} << elements) - 1);
  for (int64_t i = 0; i < TILE; ++i)
    _mm512_store_si512(whole[i], i < rows ? _mm512_maskz_loadu_epi16(mask, from + i * row) : _mm512_setzero_si512());
  load_tile<REGISTER>(whole[0], TILE_K);
}

// Adds left [rows, depth] right [depth, 16 N] to the sums of M x N tiles, for columns of tiles J .. N - 1. `depth` is
// at most TILE_K, and `rows` at most 16 M. If WHOLE is set, both have these values. The matrix registers 0 to 5 contain
// the sums, register 6 a tile of left, and register 7 a tile of right.
template <int M, int N, bool WHOLE, int J = 0>
EFFT_INLINE void multiply_columns(
    const bf16* left, int64_t left_row, int64_t rows, const bf16* right, int64_t right_row, int64_t depth) {
  const auto load_left = [&](int64_t i) {
    const bf16* from = left + i * left_row;
    WHOLE ? load_tile<6>(from, left_row) : load_part<6>(from, left_row, rows - i, depth);
  };
  const bf16* from = right + J * TILE_K;
  WHOLE ? load_tile<7>(from, right_row) : load_part<7>(from, right_row, (depth + 1) / 2, TILE_K);
  load_left(0);
  multiply_tiles<J, 6, 7>();
  if constexpr (M > 1) {
    load_left(TILE);
    multiply_tiles<3 + J, 6, 7>();
  }
  if constexpr (J + 1 < N) multiply_columns<M, N, WHOLE, J + 1>(left, left_row, rows, right, right_row, depth);
}

template <int M, int N>
EFFT_INLINE void zero_sums() {
  zero_tile<N - 1>();
  if constexpr (M > 1) zero_tile<3 + N - 1>();
  if constexpr (N > 1) zero_sums<M, N - 1>();
}

template <int M, int N>
EFFT_INLINE void store_sums(float* to, int64_t row) {
  store_tile<N - 1>(to + (N - 1) * TILE, row);
  if constexpr (M > 1) store_tile<3 + N - 1>(to + TILE * row + (N - 1) * TILE, row);
  if constexpr (N > 1) store_sums<M, N - 1>(to, row);
}

// Computes C [rows, columns] = init + A B, where C has at most M x N tiles.
template <int M, int N, class Init, class Out>
void matrix_tiles(
    int64_t rows, int64_t columns, int64_t depth, Operand<bf16> A, Rows<const bf16> B, Base<Init> init, Rows<Out> C) {
  zero_sums<M, N>();
  const bool whole_rows = rows == M * TILE;
  for (int64_t k = 0; k < depth; k += TILE_K) {
    const bf16* a = A.data + k;
    const bf16* b = B.data + k / 2 * B.row;
    if (whole_rows && k + TILE_K <= depth)
      multiply_columns<M, N, true>(a, A.row, rows, b, B.row, TILE_K);
    else
      multiply_columns<M, N, false>(a, A.row, rows, b, B.row, std::min(TILE_K, depth - k));
  }
  alignas(64) float sums[M * TILE][N * TILE];
  store_sums<M, N>(sums[0], N * TILE);
  for (int64_t i = 0; i < rows; ++i) {
    const auto finish = [&](int64_t j, int count) {
      Floats sum = load(sums[i] + j, count);
      if (init.data) sum += load(init.data + i * init.row + j, count);
      if (init.bias) sum += load(init.bias + j, count);
      store(C.data + i * C.row + j, sum, count);
    };
    if (columns == N * TILE) {
#pragma GCC unroll 3
      for (int64_t j = 0; j < N; ++j) finish(j * TILE, TILE);
    } else {
      for_registers(columns, finish);
    }
  }
}

// Computes the same product as the template in product.h. Each row of A must be contiguous (A.step is 2). The function
// does not prefetch, because prefetching did not speed it up on processors with matrix registers.
template <class Init, class Out>
void product(int64_t rows, int64_t columns, int64_t depth, Operand<bf16> A, Rows<const bf16> B, Base<Init> init,
    Rows<Out> C, Ahead&) {
  constexpr int64_t height = ROWS_TOGETHER<bf16>;
  for (int64_t i = 0; i < rows; i += height)
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
      const int64_t m = std::min(rows - i, height), n = std::min(columns - j, TILE_COLUMNS);
      const auto of_width = [&](auto tiles) {
        tiles(m, n, depth, Operand<bf16>{A.data + i * A.row, A.row, A.step}, Rows<const bf16>{B.data + 2 * j, B.row},
            init.from(i, j), Rows<Out>{C.data + i * C.row + j, C.row});
      };
      if (n > 2 * TILE)
        of_width(m > TILE ? matrix_tiles<2, 3, Init, Out> : matrix_tiles<1, 3, Init, Out>);
      else if (n > TILE)
        of_width(m > TILE ? matrix_tiles<2, 2, Init, Out> : matrix_tiles<1, 2, Init, Out>);
      else
        of_width(m > TILE ? matrix_tiles<2, 1, Init, Out> : matrix_tiles<1, 1, Init, Out>);
    }
}

// Transposes a square of 16 x 16 pairs of bf16.
inline void transpose_pairs(Bits rows[TILE]) {
#pragma GCC unroll 4
  for (int distance = 1; distance < LANES; distance *= 2) {
    Ints upper{}, lower{};  // indices from 16 on denote lanes of the second operand
    for (int lane = 0; lane < LANES; ++lane) {
      upper[lane] = lane & distance ? LANES + (lane ^ distance) : lane;
      lower[lane] = lane & distance ? LANES + lane : lane ^ distance;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & distance) continue;
      const auto first = (__m512i)rows[i], second = (__m512i)rows[i | distance];
      rows[i] = (Bits)_mm512_permutex2var_epi32(first, (__m512i)upper, second);
      rows[i | distance] = (Bits)_mm512_permutex2var_epi32(first, (__m512i)lower, second);
    }
  }
}

// Returns left^T, where left is [rows, columns], as the left operand of a product that sums over the rows. The result
// is a copy in `turned`, whose rows are contiguous and padded with zeros.
inline Operand<bf16> transposed(
    Rows<const bf16> left, int64_t rows, int64_t columns, Buffer<bf16>& pairs, Buffer<bf16>& turned) {
  const int64_t depth = (rows + TILE_K - 1) / TILE_K * TILE_K, width = (columns + TILE - 1) / TILE * TILE;
  bf16* const from = pairs.room(depth * width);
  bf16* const to = turned.room(depth * width);
  const int64_t filled = (rows + 1) / 2 * 2 * width;
  interleave(left, rows, columns, width, from);
  std::memset(from + filled, 0, (depth * width - filled) * sizeof(bf16));
  for (int64_t k = 0; k < depth; k += TILE_K)
    for (int64_t j = 0; j < width; j += TILE) {
      Bits square[TILE];
      for (int64_t p = 0; p < TILE; ++p)
        std::memcpy(&square[p], from + (k / 2 + p) * 2 * width + 2 * j, sizeof square[p]);
      transpose_pairs(square);
      for (int64_t i = 0; i < TILE; ++i) std::memcpy(to + (j + i) * depth + k, &square[i], sizeof square[i]);
    }
  return {to, depth, 2};
}

#else

// Returns left^T, where left is [rows, columns], as the left operand of a product that sums over the rows. The result
// is a copy in `pairs`, in which every two rows of left are interleaved.
inline Operand<bf16> transposed(
    Rows<const bf16> left, int64_t rows, int64_t columns, Buffer<bf16>& pairs, Buffer<bf16>&) {
  const int64_t depth = (rows + 1) / 2 * 2, width = (columns + LANES - 1) / LANES * LANES;
  return {interleave(left, rows, columns, width, pairs.room(depth * width)).data, 2, 2 * width};
}

#endif

}  // namespace efft::EFFT_ISA

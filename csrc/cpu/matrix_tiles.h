// The product of product.h for bf16 in matrix registers (AMX), where the instruction set has them: tiles of 16 rows of
// 64 bytes. One configuration serves all products: what is less than a tile is first copied into a whole one of zeros.
#pragma once

#include "buffer.h"
#include "product.h"

namespace efft::EFFT_ISA {

// The calling thread's matrix registers, while it multiplies elements of E in them.
template <class E>
class MatrixRegisters {};

#if defined(__AMX_BF16__)

constexpr int64_t TILE = 16;  // rows, and columns of 32 bits: floats, or pairs of bf16
constexpr int64_t TILE_K = 2 * TILE;

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

// GCC's intrinsics do not tell it that a load reads memory.
template <int REGISTER>
EFFT_INLINE void load_tile(const bf16* from, int64_t row) {
  const int64_t bytes = row * static_cast<int64_t>(sizeof(bf16));
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(REGISTER) : "memory");
}

template <int REGISTER>
EFFT_INLINE void store_tile(float* to, int64_t row) {
  const int64_t bytes = row * static_cast<int64_t>(sizeof(float));
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(REGISTER) : "memory");
}

template <int REGISTER>
EFFT_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(REGISTER));
}

template <int I>
using Index = std::integral_constant<int, I>;

template <int SUMS, int LEFT, int RIGHT>
EFFT_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

// `rows` rows of `elements` elements, whatever lies beyond them.
template <int REGISTER>
EFFT_INLINE void load_tile(const bf16* from, int64_t row, int64_t rows, int64_t elements) {
  if (rows >= TILE && elements == TILE_K) return load_tile<REGISTER>(from, row);
  bf16 whole[TILE][TILE_K] = {};
  for (int64_t i = 0; i < std::min(rows, TILE); ++i) std::memcpy(whole[i], from + i * row, elements * sizeof(bf16));
  load_tile<REGISTER>(whole[0], TILE_K);
}

// C [rows, columns], of at most M x N tiles. Registers: 0 to 5 sums, 6 left, 7 right.
template <int M, int N, class Init, class Out>
void matrix_tiles(int64_t rows, int64_t columns, int64_t depth, Operand<bf16> A, Rows<const bf16> B, Base<Init> init,
    Rows<Out> C, Ahead& ahead) {
  const auto each_sum = [](const auto& f) {  // f(register, i, j)
    f(Index<0>{}, 0, 0);
    if constexpr (N > 1) f(Index<1>{}, 0, 1);
    if constexpr (N > 2) f(Index<2>{}, 0, 2);
    if constexpr (M > 1) f(Index<3>{}, 1, 0);
    if constexpr (M > 1 && N > 1) f(Index<4>{}, 1, 1);
    if constexpr (M > 1 && N > 2) f(Index<5>{}, 1, 2);
  };
  each_sum([](auto sum, int, int) { zero_tile<sum()>(); });
  for (int64_t k = 0; k < depth; k += TILE_K) {
    const int64_t width = std::min(TILE_K, depth - k), pairs = (width + 1) / 2;
    const bf16* a = A.data + k;
    const bf16* b = B.data + k / 2 * B.row;
    const auto by_column = [&](auto j) {
      load_tile<7>(b + j * TILE_K, B.row, pairs, TILE_K);
      load_tile<6>(a, A.row, rows, width);
      multiply_tiles<j, 6, 7>();
      if constexpr (M > 1) {
        load_tile<6>(a + TILE * A.row, A.row, rows - TILE, width);
        multiply_tiles<3 + j, 6, 7>();
      }
    };
    by_column(Index<0>{});
    if constexpr (N > 1) by_column(Index<1>{});
    if constexpr (N > 2) by_column(Index<2>{});
    for (int64_t byte = 0; byte < ahead.step; byte += 64) __builtin_prefetch(ahead.at + byte, 0, 2);
    ahead.at += ahead.step;
  }
  alignas(64) float sums[M * TILE][N * TILE];
  each_sum([&](auto sum, int i, int j) { store_tile<sum()>(sums[i * TILE] + j * TILE, N * TILE); });
  for (int64_t i = 0; i < rows; ++i)
    for_registers(columns, [&](int64_t j, int count) {
      Floats sum = load(sums[i] + j, count);
      if (init.data) sum += load(init.data + i * init.row + j, count);
      if (init.bias) sum += load(init.bias + j, count);
      store(C.data + i * C.row + j, sum, count);
    });
}

// A's pairs must lie side by side along k.
template <class Init, class Out>
void product(int64_t rows, int64_t columns, int64_t depth, Operand<bf16> A, Rows<const bf16> B, Base<Init> init,
    Rows<Out> C, Ahead& ahead) {
  constexpr int64_t height = ROWS_TOGETHER<bf16>;
  for (int64_t i = 0; i < rows; i += height)
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
      const int64_t m = std::min(rows - i, height), n = std::min(columns - j, TILE_COLUMNS);
      const auto of_width = [&](auto tiles) {
        tiles(m, n, depth, Operand<bf16>{A.data + i * A.row, A.row, A.step}, Rows<const bf16>{B.data + 2 * j, B.row},
            init.from(i, j), Rows<Out>{C.data + i * C.row + j, C.row}, ahead);
      };
      if (n > 2 * TILE)
        of_width(m > TILE ? matrix_tiles<2, 3, Init, Out> : matrix_tiles<1, 3, Init, Out>);
      else if (n > TILE)
        of_width(m > TILE ? matrix_tiles<2, 2, Init, Out> : matrix_tiles<1, 2, Init, Out>);
      else
        of_width(m > TILE ? matrix_tiles<2, 1, Init, Out> : matrix_tiles<1, 1, Init, Out>);
    }
}

// Of 16 rows of 16 pairs.
inline void transpose_pairs(Bits rows[TILE]) {
#pragma GCC unroll 4
  for (int distance = 1; distance < TILE; distance *= 2) {
    Ints upper{}, lower{};  // lanes of the first operand, and from 16 on of the second
    for (int lane = 0; lane < TILE; ++lane) {
      upper[lane] = lane & distance ? TILE + (lane ^ distance) : lane;
      lower[lane] = lane & distance ? TILE + lane : lane ^ distance;
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE; ++i) {
      if (i & distance) continue;
      const auto first = (__m512i)rows[i], second = (__m512i)rows[i | distance];
      rows[i] = (Bits)_mm512_permutex2var_epi32(first, (__m512i)upper, second);
      rows[i | distance] = (Bits)_mm512_permutex2var_epi32(first, (__m512i)lower, second);
    }
  }
}

// The left side of a product left^T right.
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

// The left side of a product left^T right.
inline Operand<bf16> transposed(
    Rows<const bf16> left, int64_t rows, int64_t columns, Buffer<bf16>& pairs, Buffer<bf16>&) {
  const int64_t depth = (rows + 1) / 2 * 2, width = (columns + LANES - 1) / LANES * LANES;
  return {interleave(left, rows, columns, width, pairs.room(depth * width)).data, 2, 2 * width};
}

#endif

}  // namespace efft::EFFT_ISA

// Defines the class Accumulator, with which a block computes one tile of a product A B. It holds the fp32 sums of the
// tile, which are distributed over the registers of the block's threads. Its member function `add` multiplies a tile of
// A by a tile of B, which are in shared memory, and adds the product to the sums.
#pragma once

#include <type_traits>

#include "tiles.cuh"

namespace efft {

// The order of an operand's dimensions in shared memory. The first dimension is either the outer one (M for A, N for
// B), or the one that is summed over (K).
enum class Order : uint8_t { outer_first, sum_first };

template <class T, int OUTER, int K, Order ORDER>
using Operand = std::conditional_t<ORDER == Order::outer_first, Tile<T, OUTER, K>, Tile<T, K, OUTER>>;

// Computes sums [M, N] += A [M, K] B [K, N] on tensor cores, for 16-bit types. The block has WARPS_M x WARPS_N warps,
// and each warp owns the sums of M / WARPS_M rows and N / WARPS_N columns.
template <class T, int M_, int N_, int K_, int WARPS_M, int WARPS_N, Order ORDER_A, Order ORDER_B>
class Accumulator {
 public:
  static constexpr int M = M_, N = N_, K = K_, THREADS = WARPS_M * WARPS_N * 32;
  static constexpr Order ORDER = ORDER_B;
  using A = Operand<T, M, K, ORDER_A>;
  using B = Operand<T, N, K, ORDER_B>;

  __device__ void add(const A& a, const B& b) {
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      uint32_t left[TILES_M][4], right[TILES_N / 2][4];
#pragma unroll
      for (int i = 0; i < TILES_M; ++i) load_left(left[i], a, first_row() + 16 * i, k);
#pragma unroll
      for (int j = 0; j < TILES_N / 2; ++j) load_right(right[j], b, first_column() + 16 * j, k);
#pragma unroll
      for (int i = 0; i < TILES_M; ++i)
#pragma unroll
        for (int j = 0; j < TILES_N; ++j) {
          const uint32_t of_tile[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          multiply_add<T>(sums_[i][j], left[i], of_tile);
        }
    }
  }

  // Calls f(row, column, sum, next) for every pair of sums that this thread owns. `sum` belongs to `column`, which is
  // even, and `next` belongs to the column after it.
  template <class F>
  __device__ void each_pair(const F& f) const {
#pragma unroll
    for (int i = 0; i < TILES_M; ++i)
#pragma unroll
      for (int j = 0; j < TILES_N; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          f(first_row() + 16 * i + 8 * half + lane() / 4, first_column() + 8 * j + lane() % 4 * 2,
              sums_[i][j][2 * half], sums_[i][j][2 * half + 1]);
  }

 private:
  static constexpr int TILES_M = M / WARPS_M / 16, TILES_N = N / WARPS_N / 8;
  static_assert(TILES_M * WARPS_M * 16 == M && TILES_N * WARPS_N * 8 == N && TILES_N % 2 == 0 && K % 16 == 0);

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / 32 % WARPS_M * (M / WARPS_M); }
  __device__ static int first_column() { return static_cast<int>(threadIdx.x) / 32 / WARPS_M * (N / WARPS_N); }

  // Loads the part [16, 16] of A that begins at row m and column k, as four matrices of 8 x 8 elements. The first two
  // matrices contain rows 0 to 7 and rows 8 to 15 of columns 0 to 7 of this part. The other two contain the same rows
  // of columns 8 to 15.
  __device__ static void load_left(uint32_t (&to)[4], const A& a, int m, int k) {
    const int matrix = lane() / 8, row = lane() % 8;
    if constexpr (ORDER_A == Order::outer_first)
      load_matrices(to, a.chunk(m + matrix % 2 * 8 + row, k / 8 + matrix / 2));
    else
      load_matrices_transposed(to, a.chunk(k + matrix / 2 * 8 + row, m / 8 + matrix % 2));
  }
  // Loads the part [16, 16] of B that begins at row k and column n, as four matrices of 8 x 8 elements in the order of
  // load_left.
  __device__ static void load_right(uint32_t (&to)[4], const B& b, int n, int k) {
    const int matrix = lane() / 8, row = lane() % 8;
    if constexpr (ORDER_B == Order::outer_first)
      load_matrices(to, b.chunk(n + matrix / 2 * 8 + row, k / 8 + matrix % 2));
    else
      load_matrices_transposed(to, b.chunk(k + matrix % 2 * 8 + row, n / 8 + matrix / 2));
  }

  float sums_[TILES_M][TILES_N][4] = {};
};

// The same class for fp32. It multiplies in full precision, without tensor cores.
template <int M_, int N_, int K_, int WARPS_M, int WARPS_N, Order ORDER_A, Order ORDER_B>
class Accumulator<float, M_, N_, K_, WARPS_M, WARPS_N, ORDER_A, ORDER_B> {
 public:
  static constexpr int M = M_, N = N_, K = K_, THREADS = WARPS_M * WARPS_N * 32;
  static constexpr Order ORDER = ORDER_B;
  using A = Operand<float, M, K, ORDER_A>;
  using B = Operand<float, N, K, ORDER_B>;

  __device__ void add(const A& a, const B& b) {
#pragma unroll 1  // an unrolled loop would need more registers than the sums leave free
    for (int k = 0; k < K; k += 4) {
      float left[ROWS][4], right[COLUMNS][4];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) load<ORDER_A>(left[i], a, row(i), k);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) load<ORDER_B>(right[j], b, column(j), k);
#pragma unroll
      for (int step = 0; step < 4; ++step)
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j) sums_[i][j] += left[i][step] * right[j][step];
    }
  }

  template <class F>
  __device__ void each_pair(const F& f) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 2) f(row(i), column(j), sums_[i][j], sums_[i][j + 1]);
  }

 private:
  static constexpr int ACROSS = 16, DOWN = THREADS / ACROSS;  // number of threads along N and along M
  static constexpr int ROWS = M / DOWN, COLUMNS = N / ACROSS;
  static_assert(ROWS * DOWN == M && COLUMNS * ACROSS == N && COLUMNS % 2 == 0);

  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / ACROSS + DOWN * i; }
  __device__ static int column(int j) {
    return (static_cast<int>(threadIdx.x) % ACROSS + ACROSS * (j / 2)) * 2 + j % 2;
  }

  template <Order ORDER, class Operand>
  __device__ static void load(float (&to)[4], const Operand& from, int outer, int k) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if constexpr (ORDER == Order::outer_first)
        to[step] = from.chunk(outer, k / 4)[step];
      else
        to[step] = from.at(k + step, outer);
    }
  }

  float sums_[ROWS][COLUMNS] = {};
};

}  // namespace efft

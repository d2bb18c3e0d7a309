// Defines SmallProduct, with which a block computes one tile of a matrix product in fp32. The kernel passes functions
// that return the elements of the two matrices. Therefore the matrices can be masked, scaled or transposed, and can
// have any strides and types. Tensor cores would be faster, so that this class is meant for small products and for
// products that are rarely computed.
#pragma once

#include "tiles.cuh"

namespace efft {

struct SmallProduct {
  static constexpr int ROWS = 32, COLUMNS = 64, DEPTH = 32, THREADS = 256;
  static constexpr int BYTES = DEPTH * (ROWS + 1 + COLUMNS) * static_cast<int>(sizeof(float));
  static constexpr int EACH = ROWS * COLUMNS / THREADS;  // number of sums per thread, all in one column

  float sums[EACH] = {};

  // Adds the sum over k < depth of left(row, k) right(k, column) to each element of the tile.
  template <class Left, class Right>
  __device__ void add(int64_t depth, const Left& left, const Right& right) {
    // a is [DEPTH, ROWS + 1] and b is [DEPTH, COLUMNS]. The additional column of a puts the elements of each of its
    // columns in different banks.
    float* const a = reinterpret_cast<float*>(shared_memory());
    float* const b = a + DEPTH * (ROWS + 1);
    const int thread = static_cast<int>(threadIdx.x);
    for (int64_t k = 0; k < depth; k += DEPTH) {
      __syncthreads();  // no thread reads the previous step any more
      for (int i = thread; i < DEPTH * ROWS; i += THREADS) {
        const int row = i / DEPTH, step = i % DEPTH;
        a[step * (ROWS + 1) + row] = k + step < depth ? left(row, k + step) : 0.0f;
      }
      for (int i = thread; i < DEPTH * COLUMNS; i += THREADS) {
        const int step = i / COLUMNS, column = i % COLUMNS;
        b[i] = k + step < depth ? right(k + step, column) : 0.0f;
      }
      __syncthreads();
      for (int step = 0; step < DEPTH; ++step)
#pragma unroll
        for (int i = 0; i < EACH; ++i) sums[i] += a[step * (ROWS + 1) + row(i)] * b[step * COLUMNS + thread % COLUMNS];
    }
  }

  // Calls f(row, column, sum) for every sum of this thread.
  template <class F>
  __device__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) f(row(i), static_cast<int>(threadIdx.x) % COLUMNS, sums[i]);
  }

 private:
  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / COLUMNS * EACH + i; }
};

}  // namespace efft

// Computes one tile of a product of small matrices per block, in fp32. Functions return the elements of the matrices,
// so that these can be masked, scaled or transposed and can have any strides and types. This is slower than tensor
// cores, and is meant for small products and for products that are computed only once.
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
    // a is [DEPTH, ROWS + 1], which puts the elements of a column in different banks; b is [DEPTH, COLUMNS].
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

// Defines SmallProduct, with which a block computes one tile of a matrix product in fp32. The kernel passes functions
// that return the elements of the two matrices. Therefore the matrices can be masked, scaled or transposed, and can
// have any strides and types. The class does not use tensor cores, which would be faster. It is meant for small
// products and for products that are rarely computed.
#pragma once

#include "tiles.cuh"

namespace efft {

// The block must have THREADS threads and at least BYTES bytes of dynamic shared memory. The tile has ROWS rows and
// COLUMNS columns. The sums over k are computed in chunks of DEPTH values of k.
struct SmallProduct {
  static constexpr int ROWS = 32, COLUMNS = 64, DEPTH = 32, THREADS = 256;
  static constexpr int BYTES = DEPTH * (ROWS + 1 + COLUMNS) * static_cast<int>(sizeof(float));
  static constexpr int EACH = ROWS * COLUMNS / THREADS;  // number of sums per thread, all in one column

  float sums[EACH] = {};

  // Adds the sum over k < depth of left(row, k) right(k, column) to each element of the tile. `row` and `column` are
  // counted from the start of the tile. They can lie beyond the edge of the matrices. The functions must then return a
  // number without reading an element, and the caller must ignore the sums for this row or column.
  template <class Left, class Right>
  __device__ void add(int64_t depth, const Left& left, const Right& right) {
    // `a` is [DEPTH, ROWS + 1], and `b` is [DEPTH, COLUMNS]. Because `a` has one column more than it needs, the
    // elements of each of its columns are in different banks.
    float* const a = reinterpret_cast<float*>(shared_memory());
    float* const b = a + DEPTH * (ROWS + 1);
    const int thread = static_cast<int>(threadIdx.x);
    for (int64_t k = 0; k < depth; k += DEPTH) {
      __syncthreads();  // no thread reads the previous chunk any more
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

  // Calls f(row, column, sum) for every sum of this thread, also for those beyond the edge of the output.
  template <class F>
  __device__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) f(row(i), static_cast<int>(threadIdx.x) % COLUMNS, sums[i]);
  }

 private:
  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / COLUMNS * EACH + i; }
};

}  // namespace efft

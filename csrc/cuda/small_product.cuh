// A block's tile of a product of small matrices in fp32, whose elements come from functions: masked, scaled, transposed
// or of any strides, whatever their type. For what is tiny, or done once.
#pragma once

#include "tiles.cuh"

namespace efft {

struct SmallProduct {
  static constexpr int ROWS = 32, COLUMNS = 64, DEPTH = 32, THREADS = 256;
  static constexpr int BYTES = DEPTH * (ROWS + 1 + COLUMNS) * static_cast<int>(sizeof(float));
  static constexpr int EACH = ROWS * COLUMNS / THREADS;  // sums of a thread, one column

  float sums[EACH] = {};

  // += sum over k < depth of left(row, k) right(k, column), for rows and columns of the tile.
  template <class Left, class Right>
  __device__ void add(int64_t depth, const Left& left, const Right& right) {
    float* const a = reinterpret_cast<float*>(shared_memory());  // [DEPTH, ROWS + 1], so that columns differ in banks
    float* const b = a + DEPTH * (ROWS + 1);                     // [DEPTH, COLUMNS]
    const int thread = static_cast<int>(threadIdx.x);
    for (int64_t k = 0; k < depth; k += DEPTH) {
      __syncthreads();  // nobody reads the last step any more
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

  // f(row, column, sum)
  template <class F>
  __device__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) f(row(i), static_cast<int>(threadIdx.x) % COLUMNS, sums[i]);
  }

 private:
  __device__ static int row(int i) { return static_cast<int>(threadIdx.x) / COLUMNS * EACH + i; }
};

}  // namespace efft

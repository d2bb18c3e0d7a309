// Packs operands: copies them into the form that the products read. The copies have the type of the products and
// aligned rows. In a batch whose samples have different adapters, the copy of a factor contains one matrix per sample.
// Factors are packed in most calls. Other operands are packed only if their type or their strides require it.
#include <algorithm>
#include <cmath>

#include "launch.h"
#include "tiles.cuh"

namespace efft {

namespace {

constexpr int THREADS = 256;

template <bool DEPENDENT>
__global__ void __launch_bounds__(THREADS) pack_kernel(const __grid_constant__ Packs all) {
  if constexpr (DEPENDENT) {
    start_next_kernel();
    wait_for_kernel_in_front();
  }
  const Pack& op = all.of[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= op.samples * op.rows * op.to.row) return;
  const int64_t column = i % op.to.row, row = i / op.to.row % op.rows, sample = i / op.to.row / op.rows;
  const int64_t from = op.adapter ? op.adapter[sample] : sample;
  float value = 0;
  if (op.adapter && from >= op.adapters)  // the host does not check indices, because it would have to wait for the GPU
    value = nanf("");
  else if (column < op.columns && from >= 0)
    value = read({op.from, op.type}, from * op.from_sample + row * op.from_row + column * op.from_column);
  write(op.to.data, op.to.type, i, value);
}

}  // namespace

cudaError_t pack(const Packs& all, cudaStream_t stream) {
  int64_t largest = 0;
  for (int i = 0; i < all.count; ++i)
    largest = std::max(largest, all.of[i].samples * all.of[i].rows * all.of[i].to.row);
  if (largest == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(largest, THREADS)), static_cast<unsigned>(all.count));
  const LaunchShape shape{grid, THREADS, 1, generation() >= 2};
  return shape.dependent ? launch<pack_kernel<true>>(shape, stream, all)
                         : launch<pack_kernel<false>>(shape, stream, all);
}

}  // namespace efft

// Copies operands into the form that the products read: their type, aligned rows, a sample's own adapter. Factors, and
// whatever comes with odd strides.
#include "launch.h"
#include "tiles.cuh"

namespace efft {

namespace {

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS) pack_kernel(const __grid_constant__ Pack op) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= op.samples * op.rows * op.to.row) return;
  const int64_t column = i % op.to.row, row = i / op.to.row % op.rows, sample = i / op.to.row / op.rows;
  const int64_t from = op.adapter ? op.adapter[sample] : sample;
  float value = 0;
  if (column < op.columns && from >= 0)
    value = read({op.from, op.type}, from * op.from_sample + row * op.from_row + column * op.from_column);
  write(op.to.data, op.to.type, i, value);
}

}  // namespace

cudaError_t pack(const Pack& op, cudaStream_t stream) {
  const int64_t size = op.samples * op.rows * op.to.row;
  if (size == 0) return cudaSuccess;
  return launch<0>(pack_kernel, dim3(static_cast<unsigned>(ceil_div(size, THREADS))), THREADS, stream, op);
}

}  // namespace efft

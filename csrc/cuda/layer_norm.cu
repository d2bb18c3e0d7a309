// dx = rstd (g - mean(g) - n mean(g n)) with g = gamma dn and n = (x - mean) rstd: one warp a row, two passes over it.
#include "launch.h"
#include "producers.cuh"

namespace efft {

namespace {

constexpr int WARPS = 4;

__global__ void __launch_bounds__(WARPS * 32) layer_norm_backward_kernel(const __grid_constant__ LayerNormBackward op) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= op.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float mean = op.norm.mean[row], rstd = op.norm.rstd[row];
  const auto gradient = [&](int64_t j) {
    const float dn = read(vector_of(op.dn), row * op.dn.row + j);
    return op.norm.gamma.data ? dn * read(op.norm.gamma, j) : dn;
  };
  const auto normal = [&](int64_t j) { return (read(vector_of(op.x), row * op.x.row + j) - mean) * rstd; };
  float total = 0, along = 0;
  for (int64_t j = lane; j < op.columns; j += 32) {
    const float g = gradient(j);
    total += g;
    along += g * normal(j);
  }
  total = warp_sum(total) / static_cast<float>(op.columns);
  along = warp_sum(along) / static_cast<float>(op.columns);
  for (int64_t j = lane; j < op.columns; j += 32)
    write(op.dx.data, op.dx.type, row * op.dx.row + j, rstd * (gradient(j) - total - normal(j) * along));
}

}  // namespace

cudaError_t layer_norm_backward(const LayerNormBackward& op, cudaStream_t stream) {
  if (op.rows * op.columns == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(op.rows, WARPS)));
  return launch<0>(layer_norm_backward_kernel, grid, WARPS * 32, stream, op);
}

}  // namespace efft

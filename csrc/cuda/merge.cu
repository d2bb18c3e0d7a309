// Adds the update of a layer to its weight W or subtracts it: W += sign (D G)^T, where D and G are the factors of the
// update. Products and sums are in fp32, the result is rounded once, and no temporary tensor has the size of W. Weights
// are rarely merged. Therefore the kernel need not be fast: it accepts any strides and uses no tensor cores.
#include "launch.h"
#include "small_product.cuh"

namespace efft {

namespace {

using Product = SmallProduct;

__global__ void __launch_bounds__(Product::THREADS) merge_kernel(const __grid_constant__ Merge op) {
  const int64_t blocks_o = (op.d_out + Product::ROWS - 1) / Product::ROWS;
  const int64_t o0 = blockIdx.x % blocks_o * Product::ROWS, i0 = blockIdx.x / blocks_o * Product::COLUMNS;
  Product product;
  product.add(
      op.rank,
      [&](int o, int64_t r) { return o0 + o < op.d_out ? read(op.G, r * op.G_row + (o0 + o) * op.G_column) : 0.0f; },
      [&](int64_t r, int i) { return i0 + i < op.d_in ? read(op.D, (i0 + i) * op.D_row + r * op.D_column) : 0.0f; });
  product.each([&](int o, int i, float sum) {
    if (o0 + o >= op.d_out || i0 + i >= op.d_in) return;
    const int64_t at = (o0 + o) * op.W_row + (i0 + i) * op.W_column;
    write(op.W, op.type, at, read({op.W, op.type}, at) + op.sign * sum);
  });
}

}  // namespace

cudaError_t merge(const Merge& op, cudaStream_t stream) {
  if (op.d_out * op.d_in == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(op.d_out, Product::ROWS) * ceil_div(op.d_in, Product::COLUMNS);
  return launch<merge_kernel, Product::BYTES>(dim3(static_cast<unsigned>(blocks)), Product::THREADS, stream, op);
}

}  // namespace efft

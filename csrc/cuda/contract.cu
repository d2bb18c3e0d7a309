// Contracts the cores C[l, c] [r1, r2] of all layers l with their common factor V [r2, d_out] in one launch, and
// computes the gradients dC and dV in another launch. The result for a layer consists of one block of columns per core,
// G[l] = [G[l, 0] | G[l, 1] | ...]. The dropout masks keep_C[l, c] [r1, r2] and keep_V[l] [r2, d_out] are 1 for
// elements that are kept and 0 for elements that are dropped. An absent mask keeps all elements. The kernels compute
// the following, where * multiplies matrices element by element:
//
//   G[l, c]  = scale (keep_C[l, c] * C[l, c]) (keep_V[l] * V)
//   dC[l, c] = scale keep_C[l, c] * (dG[l, c] (keep_V[l] * V)^T)
//   dV       = scale sum_l keep_V[l] * (sum_c (keep_C[l, c] * C[l, c])^T dG[l, c])
//
// Rounding errors in G would change the update of a layer for every token, and the factors are small enough that
// precise products are cheap. Therefore factors of every type are multiplied in fp32 without tensor cores. Sums are
// added in a fixed order. The kernels read the masks directly, so no masked copies of the factors are needed.
#include "launch.h"
#include "small_product.cuh"

namespace efft {

namespace {

// Reads elements of the masked factors. Elements outside of the matrices are zero. Core c of layer l is identified by
// its index l * n_cores + c.
struct Factors : Contraction {
  __device__ explicit Factors(const Contraction& op) : Contraction(op) {}

  __device__ int64_t core(int64_t index, int64_t i, int64_t j) const { return (index * r1 + i) * r2 + j; }
  __device__ float c(int64_t index, int64_t i, int64_t j) const {
    if (i >= r1 || j >= r2 || (keep_C && !keep_C[core(index, i, j)])) return 0;
    return read(C, core(index, i, j));
  }
  __device__ bool keeps_v(int64_t layer, int64_t j, int64_t n) const {
    return !keep_V || keep_V[(layer * r2 + j) * d_out + n];
  }
  __device__ float v(int64_t layer, int64_t j, int64_t n) const {
    return j < r2 && n < d_out && keeps_v(layer, j, n) ? read(V, j * d_out + n) : 0;
  }
  // Returns the position in G or dG, in elements, of element (i, n) of the block of columns that belongs to a core.
  __device__ int64_t g(int64_t index, int64_t i, int64_t n) const {
    return ((index / n_cores * r1 + i) * n_cores + index % n_cores) * d_out + n;
  }
};

using Product = SmallProduct;

__global__ void __launch_bounds__(Product::THREADS) contract_kernel(const __grid_constant__ Contraction op, void* G) {
  const Factors of(op);
  const int64_t blocks_i = (op.r1 + Product::ROWS - 1) / Product::ROWS;
  const int64_t index = blockIdx.x / blocks_i, layer = index / op.n_cores;
  const int64_t i0 = blockIdx.x % blocks_i * Product::ROWS, n0 = static_cast<int64_t>(blockIdx.y) * Product::COLUMNS;
  Product product;
  product.add(
      op.r2, [&](int i, int64_t j) { return of.c(index, i0 + i, j); },
      [&](int64_t j, int n) { return of.v(layer, j, n0 + n); });
  product.each([&](int i, int n, float sum) {
    if (i0 + i < op.r1 && n0 + n < op.d_out) write(G, op.C.type, of.g(index, i0 + i, n0 + n), op.scale * sum);
  });
}

// Computes one tile of the gradient of one core. Each element is a sum over the d_out columns of V.
__device__ void gradient_of_core(const Factors& of, const Vector& dG, void* dC, int64_t block) {
  const int64_t blocks_i = (of.r1 + Product::ROWS - 1) / Product::ROWS;
  const int64_t blocks_j = (of.r2 + Product::COLUMNS - 1) / Product::COLUMNS;
  const int64_t index = block / (blocks_i * blocks_j), layer = index / of.n_cores;
  const int64_t i0 = block / blocks_j % blocks_i * Product::ROWS, j0 = block % blocks_j * Product::COLUMNS;
  Product product;
  product.add(
      of.d_out, [&](int i, int64_t n) { return i0 + i < of.r1 ? read(dG, of.g(index, i0 + i, n)) : 0.0f; },
      [&](int64_t n, int j) { return of.v(layer, j0 + j, n); });
  product.each([&](int i, int j, float sum) {
    if (i0 + i >= of.r1 || j0 + j >= of.r2) return;
    const int64_t at = of.core(index, i0 + i, j0 + j);
    write(dC, of.C.type, at, of.keep_C && !of.keep_C[at] ? 0.0f : of.scale * sum);
  });
}

// Computes one tile of dV. Each element is a sum over all layers, their cores, and the r1 rows of each core.
__device__ void gradient_of_right(const Factors& of, const Vector& dG, void* dV, int64_t block) {
  const int64_t blocks_n = (of.d_out + Product::COLUMNS - 1) / Product::COLUMNS;
  const int64_t j0 = block / blocks_n * Product::ROWS, n0 = block % blocks_n * Product::COLUMNS;
  Product total;
  for (int64_t layer = 0; layer < of.n_layers; ++layer) {
    Product product;
    for (int64_t index = layer * of.n_cores; index < (layer + 1) * of.n_cores; ++index)
      product.add(
          of.r1, [&](int j, int64_t i) { return of.c(index, i, j0 + j); },
          [&](int64_t i, int n) { return n0 + n < of.d_out ? read(dG, of.g(index, i, n0 + n)) : 0.0f; });
    int place = 0;
    product.each([&](int j, int n, float sum) {
      if (j0 + j < of.r2 && n0 + n < of.d_out && of.keeps_v(layer, j0 + j, n0 + n)) total.sums[place] += sum;
      ++place;
    });
  }
  total.each([&](int j, int n, float sum) {
    if (j0 + j < of.r2 && n0 + n < of.d_out) write(dV, of.V.type, (j0 + j) * of.d_out + n0 + n, of.scale * sum);
  });
}

__global__ void __launch_bounds__(Product::THREADS) contract_backward_kernel(
    const __grid_constant__ Contraction op, const Vector dG, void* dC, void* dV, int64_t blocks_dC) {
  const Factors of(op);
  if (blockIdx.x < blocks_dC)
    gradient_of_core(of, dG, dC, blockIdx.x);
  else
    gradient_of_right(of, dG, dV, blockIdx.x - blocks_dC);
}

}  // namespace

cudaError_t contract(const Contraction& op, void* G, cudaStream_t stream) {
  const int64_t blocks = op.n_layers * op.n_cores * ceil_div(op.r1, Product::ROWS);
  if (blocks * op.d_out == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(op.d_out, Product::COLUMNS)));
  return launch<contract_kernel, Product::BYTES>(grid, Product::THREADS, stream, op, G);
}

cudaError_t contract_backward(const Contraction& op, Vector dG, void* dC, void* dV, cudaStream_t stream) {
  const int64_t blocks_dC =
      dC ? op.n_layers * op.n_cores * ceil_div(op.r1, Product::ROWS) * ceil_div(op.r2, Product::COLUMNS) : 0;
  const int64_t blocks_dV = dV ? ceil_div(op.r2, Product::ROWS) * ceil_div(op.d_out, Product::COLUMNS) : 0;
  if (blocks_dC + blocks_dV == 0) return cudaSuccess;
  return launch<contract_backward_kernel, Product::BYTES>(
      dim3(static_cast<unsigned>(blocks_dC + blocks_dV)), Product::THREADS, stream, op, dG, dC, dV, blocks_dC);
}

}  // namespace efft

// Computes the forward and backward passes of the producer of a layer (the GELU or layer norm that runs directly before
// the layer) in separate kernels. The GELU is computed element by element. One warp computes the layer norm of a row.
// The forward kernel writes the producer's output, which the layer's products read. The backward kernel computes the
// gradient of the producer's input from the gradient of the output. It also recomputes the output, which therefore need
// not be saved for the backward pass.
//
// The producer is not computed where a product reads its operands, because its arithmetic there costs more than a
// separate pass over memory. On an H100, the sums over tokens took six times as long when they applied a GELU to the
// values that they read. The reverse is different: lowrank_gemm_pingpong_sm90.cu applies a GELU to a tile that it has
// computed, while another warp group uses the tensor cores. It then replaces the kernels for the GELU in this file.
#include "gelu.cuh"
#include "launch.h"
#include "tiles.cuh"

namespace efft {

namespace {

constexpr int WARPS = 4, THREADS = WARPS * 32;

__device__ float warp_sum(float value) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

// The number of elements that a thread reads or writes at a time.
constexpr int EACH = 8;

template <class T>
struct alignas(16) Elements {
  T values[EACH];
};

// Loads elements k .. k + 7 of a row, converted to floats, and sets those beyond the last column to zero. The rows of
// the matrix must be aligned to 16 bytes.
template <class T>
__device__ void load(float (&to)[EACH], const Matrix& from, int64_t row, int64_t k, int64_t columns) {
  const T* const at = static_cast<const T*>(from.data) + row * from.row + k;
  if (k + EACH <= columns) {
    const Elements<T> all = *reinterpret_cast<const Elements<T>*>(at);
#pragma unroll
    for (int i = 0; i < EACH; ++i) to[i] = widen(all.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i) to[i] = k + i < columns ? widen(at[i]) : 0.0f;
  }
}

// Stores elements k .. k + 7 of a row, except those beyond the last column. The rows need no alignment.
template <class T>
__device__ void store(const float (&from)[EACH], const Matrix& to, int64_t row, int64_t k, int64_t columns) {
  T* const at = static_cast<T*>(to.data) + row * to.row + k;
  if (k + EACH <= columns && to.row % EACH == 0) {
    Elements<T> all;
#pragma unroll
    for (int i = 0; i < EACH; ++i) all.values[i] = narrow<T>(from[i]);
    *reinterpret_cast<Elements<T>*>(at) = all;
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (k + i < columns) at[i] = narrow<T>(from[i]);
  }
}

// Stores elements k .. k + 7 of a row in the type of the matrix `to`, which may be any of the three types. dx needs
// this, because it has the type of the x that the caller passed. If this type is neither float nor the type of the
// products, the kernel reads a copy of x in float.
__device__ void store_in_own_type(
    const float (&from)[EACH], const Matrix& to, int64_t row, int64_t k, int64_t columns) {
  if (to.type == Type::float32) return store<float>(from, to, row, k, columns);
  if (to.type == Type::bfloat16) return store<bf16>(from, to, row, k, columns);
  store<fp16>(from, to, row, k, columns);
}

// Loads elements k .. k + 7 of gamma or beta. Elements beyond the last column, and all elements if the tensor is
// absent, are set to `absent`.
__device__ void load(float (&to)[EACH], const Vector& from, int64_t k, int64_t columns, float absent) {
#pragma unroll
  for (int i = 0; i < EACH; ++i) to[i] = from.data && k + i < columns ? read(from, k + i) : absent;
}

// X is the type of the producer's input, and T is the type of its output.
template <class X, class T>
__global__ void __launch_bounds__(THREADS) gelu_kernel(const __grid_constant__ Produce op) {
  const int64_t chunks = (op.columns + EACH - 1) / EACH;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, row = i / chunks, k = i % chunks * EACH;
  if (row >= op.rows) return;
  float values[EACH];
  load<X>(values, op.x, row, k, op.columns);
#pragma unroll
  for (int j = 0; j < EACH; ++j) values[j] = gelu<T>(values[j], op.producer).value;
  store<T>(values, op.out, row, k, op.columns);
}

template <class X, class T>
__global__ void __launch_bounds__(THREADS) gelu_backward_kernel(const __grid_constant__ ProduceBackward op) {
  const int64_t chunks = (op.columns + EACH - 1) / EACH;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, row = i / chunks, k = i % chunks * EACH;
  if (row >= op.rows) return;
  float values[EACH], gradient[EACH] = {};
  load<X>(values, op.x, row, k, op.columns);
  if (op.dx.data) load<T>(gradient, op.dout, row, k, op.columns);
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const Gelu at = gelu<T>(values[j], op.producer);
    values[j] = at.value;
    gradient[j] *= at.slope;
  }
  if (op.dx.data) store_in_own_type(gradient, op.dx, row, k, op.columns);
  if (op.out.data) store<T>(values, op.out, row, k, op.columns);
}

// Calls f(values, k) for each group of EACH elements of a row that this lane processes; k is the first column.
template <class X, class F>
__device__ void each_of_row(const Matrix& x, int64_t row, int64_t columns, const F& f) {
#pragma unroll 4
  for (int64_t k = static_cast<int64_t>(threadIdx.x) % 32 * EACH; k < columns; k += 32 * EACH) {
    float values[EACH];
    load<X>(values, x, row, k, columns);
    f(values, k);
  }
}

// Computes and writes the output of the norm for one row, whose mean and rstd are known.
template <class X, class T>
__device__ void put_out_norm(
    const Matrix& x, const Matrix& out, const Norm& norm, int64_t row, int64_t columns, float mean, float rstd) {
  each_of_row<X>(x, row, columns, [&](float (&values)[EACH], int64_t k) {
    float gamma[EACH], beta[EACH];
    load(gamma, norm.gamma, k, columns, 1.0f);
    load(beta, norm.beta, k, columns, 0.0f);
#pragma unroll
    for (int j = 0; j < EACH; ++j) values[j] = (values[j] - mean) * rstd * gamma[j] + beta[j];
    store<T>(values, out, row, k, columns);
  });
}

// Reads each row three times; the second and the third time, it is usually in the cache. The first read is for the
// mean, the second for the variance, and the third for the output. The variance needs its own read, because the
// difference between the mean of the squares and the square of the mean would lose digits.
template <class X, class T>
__global__ void __launch_bounds__(THREADS) norm_kernel(const __grid_constant__ Produce op) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= op.rows) return;
  const float count = static_cast<float>(op.columns);
  float total = 0, squares = 0;
  each_of_row<X>(op.x, row, op.columns, [&](const float (&values)[EACH], int64_t) {
#pragma unroll
    for (int j = 0; j < EACH; ++j) total += values[j];
  });
  const float mean = warp_sum(total) / count;
  each_of_row<X>(op.x, row, op.columns, [&](const float (&values)[EACH], int64_t k) {
#pragma unroll
    for (int j = 0; j < EACH; ++j)
      if (k + j < op.columns) squares += (values[j] - mean) * (values[j] - mean);
  });
  const float rstd = 1.0f / sqrtf(warp_sum(squares) / count + op.norm.eps);
  if (threadIdx.x % 32 == 0) {
    op.norm.mean[row] = mean;
    op.norm.rstd[row] = rstd;
  }
  put_out_norm<X, T>(op.x, op.out, op.norm, row, op.columns, mean, rstd);
}

// Computes dx = rstd (g - mean(g) - n mean(g n)) with g = gamma dout and n = (x - mean) rstd, and writes the output of
// the norm again if it is needed. The launch bounds demand only 4 blocks per multiprocessor, so that the compiler has
// enough registers to avoid spills.
template <class X, class T>
__global__ void __launch_bounds__(THREADS, 4) norm_backward_kernel(const __grid_constant__ ProduceBackward op) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= op.rows) return;
  const float mean = op.norm.mean[row], rstd = op.norm.rstd[row], count = static_cast<float>(op.columns);
  if (op.out.data) put_out_norm<X, T>(op.x, op.out, op.norm, row, op.columns, mean, rstd);
  if (!op.dx.data) return;
  // Calls f(n, g, k) for each group of elements of the row.
  const auto each = [&](const auto& f) {
    each_of_row<X>(op.x, row, op.columns, [&](float (&values)[EACH], int64_t k) {
      float g[EACH], gamma[EACH];
      load<T>(g, op.dout, row, k, op.columns);
      load(gamma, op.norm.gamma, k, op.columns, 1.0f);
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        g[j] *= gamma[j];  // g[j] is zero beyond the last column
        values[j] = (values[j] - mean) * rstd;
      }
      f(values, g, k);
    });
  };
  float total = 0, along = 0;
  each([&](const float (&n)[EACH], const float (&g)[EACH], int64_t) {
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      total += g[j];
      along += g[j] * n[j];
    }
  });
  total = warp_sum(total) / count;
  along = warp_sum(along) / count;
  each([&](float (&n)[EACH], const float (&g)[EACH], int64_t k) {
#pragma unroll
    for (int j = 0; j < EACH; ++j) n[j] = rstd * (g[j] - total - n[j] * along);
    store_in_own_type(n, op.dx, row, k, op.columns);
  });
}

template <auto GELU, auto NORM, class Op>
cudaError_t launch_producer(const Op& op, cudaStream_t stream) {
  if (op.rows * op.columns == 0) return cudaSuccess;
  if (op.producer == Producer::norm)
    return launch<NORM>(dim3(static_cast<unsigned>(ceil_div(op.rows, WARPS))), THREADS, stream, op);
  const int64_t chunks = op.rows * ceil_div(op.columns, EACH);
  return launch<GELU>(dim3(static_cast<unsigned>(ceil_div(chunks, THREADS))), THREADS, stream, op);
}

template <class X, class T>
cudaError_t forward(const Produce& op, cudaStream_t stream) {
  return launch_producer<gelu_kernel<X, T>, norm_kernel<X, T>>(op, stream);
}

template <class X, class T>
cudaError_t backward(const ProduceBackward& op, cudaStream_t stream) {
  return launch_producer<gelu_backward_kernel<X, T>, norm_backward_kernel<X, T>>(op, stream);
}

}  // namespace

cudaError_t produce(const Produce& op, cudaStream_t stream) {
  const bool wide = op.x.type == Type::float32;
  if (op.out.type == Type::float32) return forward<float, float>(op, stream);
  if (op.out.type == Type::bfloat16) return wide ? forward<float, bf16>(op, stream) : forward<bf16, bf16>(op, stream);
  return wide ? forward<float, fp16>(op, stream) : forward<fp16, fp16>(op, stream);
}

cudaError_t produce_backward(const ProduceBackward& op, cudaStream_t stream) {
  const bool wide = op.x.type == Type::float32;
  if (op.type == Type::float32) return backward<float, float>(op, stream);
  if (op.type == Type::bfloat16) return wide ? backward<float, bf16>(op, stream) : backward<bf16, bf16>(op, stream);
  return wide ? backward<float, fp16>(op, stream) : backward<fp16, fp16>(op, stream);
}

}  // namespace efft

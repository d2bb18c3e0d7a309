// The producers of a layer, each a pass of its own: GELU element by element, layer norm with a warp per row.
// Forward puts out what the layer's products read; backward takes the gradient of that to the gradient of what came in
// and, on the way, puts the same out again, so that it need not be kept.
//
// On their own because the arithmetic of a producer inside a product costs more than this pass over memory: measured on
// an H100, a GELU read through the sums over tokens took six times as long as the sums alone.
#include "launch.h"
#include "tiles.cuh"

namespace efft {

namespace {

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr float DENSITY_AT_ZERO = 0.3989422804014327f;  // of the normal distribution
constexpr float TANH_SCALE = 1.5957691216057308f;       // 2 sqrt(2 / pi)

// A value of the GELU, and its slope.
struct Gelu {
  float value, slope;
};

template <class T>
__device__ Gelu gelu(float z, Producer which) {
  if (which == Producer::gelu_tanh) {
    // (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3)
    const float s = 1.0f / (1.0f + expf(-TANH_SCALE * z * (1.0f + 0.044715f * z * z)));
    return {z * s, s + z * s * (1.0f - s) * TANH_SCALE * (1.0f + 0.134145f * z * z)};
  }
  float cdf, bell;
  if constexpr (sizeof(T) == sizeof(float)) {
    cdf = 0.5f * erfcf(-0.7071067811865476f * z);  // 1 + erf would lose the tail
    bell = expf(-0.5f * z * z);
  } else {
    // Abramowitz and Stegun 7.1.26, within 1.5e-7: nothing beside the rounding to 16 bits, and one exponential for
    // both.
    bell = __expf(-0.5f * z * z);
    const float t = __fdividef(1.0f, 1.0f + 0.23164189f * fabsf(z));
    const float tail =
        0.5f * bell * t *
        (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    cdf = z < 0 ? tail : 1.0f - tail;
  }
  return {z * cdf, cdf + z * DENSITY_AT_ZERO * bell};
}

__device__ float warp_sum(float value) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

// Elements that a thread reads and writes together.
constexpr int EACH = 8;

template <class T>
struct alignas(16) Elements {
  T values[EACH];
};

// Elements k .. k + 7 of a row, as far as it has them; in one go where the matrix's rows are aligned.
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

// In the matrix's own type: an x of another 16-bit type than the product's is read through a copy in float.
__device__ void store_in_own_type(
    const float (&from)[EACH], const Matrix& to, int64_t row, int64_t k, int64_t columns) {
  if (to.type == Type::float32) return store<float>(from, to, row, k, columns);
  if (to.type == Type::bfloat16) return store<bf16>(from, to, row, k, columns);
  store<fp16>(from, to, row, k, columns);
}

// gamma or beta; `absent` where there is none.
__device__ void load(float (&to)[EACH], const Vector& from, int64_t k, int64_t columns, float absent) {
#pragma unroll
  for (int i = 0; i < EACH; ++i) to[i] = from.data && k + i < columns ? read(from, k + i) : absent;
}

// X: of what came in, T: of what is put out.
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

// f(values, k) for the elements of a row that this lane takes.
template <class X, class F>
__device__ void each_of_row(const Matrix& x, int64_t row, int64_t columns, const F& f) {
#pragma unroll 4
  for (int64_t k = static_cast<int64_t>(threadIdx.x) % 32 * EACH; k < columns; k += 32 * EACH) {
    float values[EACH];
    load<X>(values, x, row, k, columns);
    f(values, k);
  }
}

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

// Three reads, two of them from the cache: a variance from the mean square would cancel.
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

// dx = rstd (g - mean(g) - n mean(g n)) with g = gamma dout and n = (x - mean) rstd. Told how few blocks are enough,
// the compiler spills nothing.
template <class X, class T>
__global__ void __launch_bounds__(THREADS, 4) norm_backward_kernel(const __grid_constant__ ProduceBackward op) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= op.rows) return;
  const float mean = op.norm.mean[row], rstd = op.norm.rstd[row], count = static_cast<float>(op.columns);
  if (op.out.data) put_out_norm<X, T>(op.x, op.out, op.norm, row, op.columns, mean, rstd);
  if (!op.dx.data) return;
  // f(n, g, k)
  const auto each = [&](const auto& f) {
    each_of_row<X>(op.x, row, op.columns, [&](float (&values)[EACH], int64_t k) {
      float g[EACH], gamma[EACH];
      load<T>(g, op.dout, row, k, op.columns);
      load(gamma, op.norm.gamma, k, op.columns, 1.0f);
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        g[j] *= gamma[j];  // zero beyond the row
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

// What stands in front of an adapted layer: GELU and its slope, layer norm. A kernel that reads an activation through
// its producer reads what the producer got instead of what it put out, so that its output need not be kept.
#pragma once

#include "tiles.cuh"

namespace efft {

constexpr float HALF_ROOT = 0.7071067811865476f;        // sqrt(1 / 2)
constexpr float DENSITY_AT_ZERO = 0.3989422804014327f;  // of the normal distribution
constexpr float TANH_SCALE = 1.5957691216057308f;       // 2 sqrt(2 / pi)

// (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3)
__device__ inline float logistic(float z) {
  return 1.0f / (1.0f + expf(-TANH_SCALE * z * (1.0f + 0.044715f * z * z)));
}

__device__ inline float normal_cdf(float z) {
  return 0.5f * erfcf(-HALF_ROOT * z);  // 1 + erf would lose the tail
}

__device__ inline float gelu(float z, Producer which) {
  return z * (which == Producer::gelu_tanh ? logistic(z) : normal_cdf(z));
}

__device__ inline float gelu_slope(float z, Producer which) {
  if (which == Producer::gelu) return normal_cdf(z) + z * DENSITY_AT_ZERO * expf(-0.5f * z * z);
  const float s = logistic(z);
  return s + z * s * (1.0f - s) * TANH_SCALE * (1.0f + 0.134145f * z * z);
}

__device__ inline float normalized(float x, const Norm& norm, int64_t row, int64_t column) {
  float n = (x - norm.mean[row]) * norm.rstd[row];
  if (norm.gamma.data) n *= read(norm.gamma, column);
  if (norm.beta.data) n += read(norm.beta, column);
  return n;
}

// tile = producer(raw), element by element, of the chunks that this thread has copied itself; what does not exist is
// zero.
template <int THREADS, class X, class T, int ROWS, int COLUMNS>
__device__ void produce(const Tile<X, ROWS, COLUMNS>& raw, const Tile<T, ROWS, COLUMNS>& tile, Producer producer,
    const Norm& norm, const Source<X>& from, int64_t row, int64_t column) {
  each_own_chunk<THREADS>(raw, [&](int r, int c) {
    constexpr int PER_CHUNK = Tile<X, ROWS, COLUMNS>::PER_CHUNK;
    const X* got = raw.chunk(r, c);
    T* to = &tile.at(r, c * PER_CHUNK);
#pragma unroll
    for (int i = 0; i < PER_CHUNK; ++i) {
      const int64_t m = row + r, k = column + c * PER_CHUNK + i;
      float value = 0;
      if (m < from.rows && k < from.columns)
        value = producer == Producer::norm ? normalized(widen(got[i]), norm, m, k) : gelu(widen(got[i]), producer);
      to[i] = narrow<T>(value);
    }
  });
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
  return value;
}

}  // namespace efft

// Defines the GELU and its derivative, for the kernels in producers.cu and for the product in
// lowrank_gemm_pingpong_sm90.cu.
#pragma once

#include "instructions.cuh"
#include "kernels.h"

namespace efft {

constexpr float LOG2_E = 1.4426950408889634f;

// The value of the GELU at one point, and its derivative there.
struct Gelu {
  float value, slope;
};

// The GELU that is defined by the error function: z times the probability that a standard normal variable is less than
// z. T is the type to which the results are rounded.
template <class T>
__device__ inline Gelu gelu_by_erf(float z) {
  constexpr float DENSITY_AT_ZERO = 0.3989422804014327f;  // of the standard normal distribution, 1 / sqrt(2 pi)
  float cdf, bell;
  if constexpr (sizeof(T) == sizeof(float)) {
    cdf = 0.5f * erfcf(-0.7071067811865476f * z);  // 1 + erf(..) would cancel for large negative z
    bell = expf(-0.5f * z * z);
  } else {
    // This is formula 7.1.26 of Abramowitz and Stegun, with halved coefficients. Its error of at most 1.5e-7 is small
    // compared with the rounding to 16 bits, and the value and the slope share one exponential.
    bell = fast_exp2(-0.5f * LOG2_E * z * z);
    const float t = fast_reciprocal(1.0f + 0.23164189f * fabsf(z));
    const float tail =
        bell * t *
        (0.127414796f + t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
    cdf = z < 0 ? tail : 1.0f - tail;
  }
  return {z * cdf, cdf + z * DENSITY_AT_ZERO * bell};
}

// The approximation of the GELU with tanh. T is the type to which the results are rounded.
template <class T>
__device__ inline Gelu gelu_by_tanh(float z) {
  constexpr float SCALE = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  // s = (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (z + 0.044715 z^3)
  const float u = -SCALE * z * (1.0f + 0.044715f * z * z);
  float s;
  if constexpr (sizeof(T) == sizeof(float))
    s = 1.0f / (1.0f + expf(u));
  else  // exact enough for 16 bits
    s = fast_reciprocal(1.0f + fast_exp2(LOG2_E * u));
  return {z * s, s + z * s * (1.0f - s) * SCALE * (1.0f + 0.134145f * z * z)};
}

// `which` is Producer::gelu or Producer::gelu_tanh.
template <class T>
__device__ inline Gelu gelu(float z, Producer which) {
  return which == Producer::gelu_tanh ? gelu_by_tanh<T>(z) : gelu_by_erf<T>(z);
}

}  // namespace efft

// Computes GELU and layer norm on registers and rows of floats, and the values that their backward passes need.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace efft::EFFT_ISA {

struct Gelu {
  Floats value;
  Floats slope;
};

// Returns z Phi(z) and its slope Phi(z) + z phi(z). Phi(-|z|) = exp(-z^2 / 2) q(|z|), where q = erfcx(|z| / sqrt 2) / 2
// is smooth. q is approximated by a polynomial in t = 1 / (1 + 0.3 |z|) with a relative error of 4e-9 on [0, 14]. One
// exponential serves both results, and the tail for negative z is not the difference of two large numbers.
inline Gelu gelu(Floats z) {
  const Floats size = select(z < 0.0f, -z, z);
  const Floats t = 1.0f / (1.0f + 0.3f * size);
  constexpr float q[] = {0.119686633f, 0.119572908f, 0.110226810f, 0.0784279108f, 0.0960512534f, -0.0792353526f,
      0.191567525f, -0.228057012f, 0.112371340f, -0.0206120145f};
  Floats p = splat(q[9]);
#pragma GCC unroll 9
  for (int i = 8; i >= 0; --i) p = p * t + q[i];
  const Floats density = exp(-0.5f * z * z);
  const Floats tail = density * p * t;
  const Floats phi = select(z < 0.0f, tail, 1.0f - tail);
  return {z * phi, phi + z * density * 0.398942280f};
}

// Computes the tanh approximation 0.5 z (1 + tanh(v / 2)) = z s(v) with one exponential, where s is the logistic
// function and v = 2 sqrt(2 / pi) (z + 0.044715 z^3). It computes s(-|v|), whose relative error is small,
// and 1 - s(-|v|) for positive v.
inline Gelu gelu_tanh(Floats z) {
  constexpr float k = 1.59576912f, k_cubic = 0.0713548163f;
  const Floats square = z * z;
  const Floats v = z * (k + k_cubic * square);
  const Floats e = exp(select(v < 0.0f, v, -v));
  const Floats larger = 1.0f / (1.0f + e);
  const Floats smaller = e * larger;
  const Floats s = select(z < 0.0f, smaller, larger);
  return {z * s, s + z * larger * smaller * (k + 3 * k_cubic * square)};
}

struct Moments {
  float mean;
  float rstd;
};

// The second pass also corrects the rounding error of the mean, which a small deviation would magnify. The norm of a
// row of equal numbers is therefore exactly zero.
inline Moments moments(const float* x, int64_t size, float eps) {
  const float n = static_cast<float>(size);
  Floats total{}, offsets{}, squares{};
  for_registers(size, [&](int64_t j, int count) { total += load(x + j, count); });
  const float about = sum(total) / n;
  for_registers(size, [&](int64_t j, int count) {
    const Floats offset = first(load(x + j, count) - about, count);
    offsets += offset;
    squares += offset * offset;
  });
  const float correction = sum(offsets) / n;
  const float variance = std::max(sum(squares) / n - correction * correction, 0.0f);  // NaN stays NaN
  return {about + correction, 1.0f / __builtin_sqrtf(variance + eps)};
}

// A null gamma means one, and a null beta means zero.
inline void normalize(const float* x, int64_t size, Moments of, const float* gamma, const float* beta, float* out) {
  for_registers(size, [&](int64_t j, int count) {
    Floats n = (load(x + j, count) - of.mean) * of.rstd;
    if (gamma) n *= load(gamma + j, count);
    if (beta) n += load(beta + j, count);
    store(out + j, n, count);
  });
}

// Computes dx of a row from dn, the gradient of the output of normalize.
template <class Out>
inline void normalize_backward(const float* dn, const float* x, int64_t size, Moments of, const float* gamma, Out* dx) {
  const auto gradient = [&](int64_t j, int count) {
    return gamma ? load(dn + j, count) * load(gamma + j, count) : load(dn + j, count);
  };
  Floats total{}, along{};
  for_registers(size, [&](int64_t j, int count) {
    const Floats g = gradient(j, count);
    total += g;
    along += g * (load(x + j, count) - of.mean);
  });
  const float mean = sum(total) / static_cast<float>(size);
  const float slope = sum(along) * of.rstd * of.rstd / static_cast<float>(size);
  for_registers(size, [&](int64_t j, int count) {
    store(dx + j, of.rstd * (gradient(j, count) - mean - (load(x + j, count) - of.mean) * slope), count);
  });
}

}  // namespace efft::EFFT_ISA

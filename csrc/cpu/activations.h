// Computes the GELU and its derivative for a register of floats, and the forward and backward passes of a layer norm
// for a row of floats.
#pragma once

#include <algorithm>

#include "lanes.h"

namespace efft::EFFT_ISA {

// The value of a GELU, and its derivative.
struct Gelu {
  Floats value;
  Floats slope;
};

// Returns z Phi(z) and its derivative Phi(z) + z phi(z), where Phi is the distribution function of the standard normal
// distribution and phi is its density. It uses Phi(-|z|) = exp(-z^2 / 2) q(|z|), where q(|z|) = erfcx(|z| / sqrt 2) / 2
// is smooth. A polynomial in t = 1 / (1 + 0.3 |z|) approximates q with a relative error of 4e-9 on [0, 14]. The value
// and the derivative share one exponential. For negative z, Phi(z) is not computed as 1 - Phi(-z), because this
// difference of nearly equal numbers would lose precision.
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

// Returns the tanh approximation of the GELU, 0.5 z (1 + tanh(v / 2)) = z s(v), and its derivative. s is the logistic
// function, and v = 2 sqrt(2 / pi) (z + 0.044715 z^3). The function computes one exponential, e = exp(-|v|), and from
// it s(|v|) = 1 / (1 + e) and s(-|v|) = e / (1 + e). Both have small relative errors.
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

// The mean of a row, and the scale by which a layer norm multiplies the deviations from the mean.
struct Moments {
  float mean;
  float rstd;  // 1 / sqrt(variance + eps)
};

// Returns the moments of a row. The second pass over the row computes the variance, and also corrects the rounding
// error of the mean, because the norm divides by the standard deviation and would magnify this error if the deviation
// is small. Therefore the norm of a row of equal numbers is exactly zero.
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

// Computes the layer norm of a row with the given moments. A null gamma means ones, and a null beta means zeros.
inline void normalize(const float* x, int64_t size, Moments of, const float* gamma, const float* beta, float* out) {
  for_registers(size, [&](int64_t j, int count) {
    Floats n = (load(x + j, count) - of.mean) * of.rstd;
    if (gamma) n *= load(gamma + j, count);
    if (beta) n += load(beta + j, count);
    store(out + j, n, count);
  });
}

// Computes the gradient dx of a row x from dn, the gradient of the output of normalize.
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

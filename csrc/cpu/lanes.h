// Defines the type Floats, a SIMD register of floats in the instruction set for which this file is compiled, and its
// operations. A lane is one element of a register. The code uses the compiler's vector types, so that the same source
// works for AVX-512, AVX2, SSE and NEON. The kernels are compiled once per instruction set. Each time, the macro
// EFFT_ISA has another value, which is the name of the namespace (see kernels.cpp and dispatch.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Marks functions that must be inlined. If a caller passes a constant as `count`, the compiler then treats `count` as a
// constant in the function too.
#define EFFT_INLINE inline __attribute__((always_inline))

namespace efft::EFFT_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

// A number in the format bfloat16, which is the upper half of a float.
struct bf16 {
  uint16_t bits;
};

// Whether the instruction set multiplies pairs of bf16.
#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif
// The type of the elements that products of matrices in T multiply: bf16 if T is bf16 and PAIRS is set, else float.
template <class T>
using Element = std::conditional_t<PAIRS && std::is_same_v<T, bf16>, bf16, float>;
// The number of terms of a sum that one multiplication adds to each lane: two for bf16, which is multiplied in pairs,
// and one for float.
template <class E>
constexpr int64_t TOGETHER = std::is_same_v<E, bf16> ? 2 : 1;

// Returns a register with `value` in every lane. It subtracts zeros, because adding them would lose the sign of a zero.
inline Floats splat(float value) {
  return value - Floats{};
}

inline Floats select(Ints where, Floats yes, Floats no) {
  return where ? yes : no;
}

// Converts 16-bit lanes to 32-bit lanes. For AVX-512, it uses the intrinsic, because GCC 12 compiles the conversion of
// vectors to several instructions.
EFFT_INLINE Bits widened(Halves half) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)half);
#else
  return __builtin_convertvector(half, Bits);
#endif
}

// The functions load and store read or write only the first `count` lanes. A load fills the other lanes with zeros.
EFFT_INLINE Floats load(const float* from, int count = LANES) {
  Floats value{};
  std::memcpy(&value, from, sizeof(float) * count);
  return value;
}

EFFT_INLINE Floats load(const bf16* from, int count = LANES) {
  Halves half{};
  std::memcpy(&half, from, sizeof(bf16) * count);
  return (Floats)(widened(half) << 16);
}

EFFT_INLINE void store(float* to, Floats value, int count = LANES) {
  std::memcpy(to, &value, sizeof(float) * count);
}

// Returns the bits of the values rounded to bf16, to nearest with ties to even. NaN stays NaN.
inline Halves rounded(Floats value) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
  const Bits bits = (Bits)value;
  const Bits nearest = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16 | 0x40);
  return __builtin_convertvector(nearest, Halves);
#endif
}

// Loads elements and returns their bits in bf16, one element per 32-bit lane.
EFFT_INLINE Bits load_bits(const float* from, int count) {
  return __builtin_convertvector(rounded(load(from, count)), Bits);
}

EFFT_INLINE Bits load_bits(const bf16* from, int count) {
  Halves half{};
  std::memcpy(&half, from, sizeof(bf16) * count);
  return widened(half);
}

EFFT_INLINE void store(bf16* to, Floats value, int count = LANES) {
  const Halves half = rounded(value);
  std::memcpy(to, &half, sizeof(bf16) * count);
}

// Returns `value` with the lanes from `count` on set to zero.
inline Floats first(Floats value, int count) {
  Ints lane{};  // initialized because cppcheck does not detect that the loop fills it
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  return select(lane < count, value, Floats{});
}

// Calls f(j, count) for every register of a row. `count` is a compile-time constant except for the last register.
template <class F>
inline void for_registers(int64_t size, const F& f) {
  int64_t j = 0;
  for (; j + LANES <= size; j += LANES) f(j, LANES);
  if (j < size) f(j, static_cast<int>(size - j));
}

inline float sum(Floats value) {
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += value[lane];
  return total;
}

// Returns exp(x) for x <= 0, with an error of about one unit in the last place. Results below the smallest normal
// number become zero.
inline Floats exp(Floats x) {
  x = select(x < -88.0f, splat(-88.0f), x);  // the exponent of exp(-88) is -127, so the result is zero
  // n is x / ln 2, rounded to an integer. Adding `shift` rounds it, because the sum has no bits left for a fraction.
  const float shift = 12582912.0f;  // 1.5 * 2^23
  const Floats shifted = x * 1.44269504088896341f + shift;
  const Floats n = shifted - shift;
  // r = x - n ln 2. ln 2 is split into two parts, so that the product of n and the larger part is exact.
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Bits exponent = ((Bits)shifted - (Bits)splat(shift) + 127) << 23;
  return p * (Floats)exponent;
}

}  // namespace efft::EFFT_ISA

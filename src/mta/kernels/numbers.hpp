// The types of the kernels, as scalars and vectors: float, double, and bfloat16, which is computed in float.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

struct bf16 { uint16_t bits; };

template <class T> struct Wide { using type = float; };
template <> struct Wide<double> { using type = double; };
template <class T> using wide = typename Wide<T>::type;

inline float load(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float load(float x) { return x; }
inline double load(double x) { return x; }

template <class T> inline T store(wide<T> x) { return x; }
template <> inline bf16 store<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0)};
}

// exp as a polynomial that compilers vectorize; the error is at most 2 units in the last place of float.
inline float exponential(float x) {
  const bool none = x < -87.f;
  x = none ? 0.f : (x > 88.f ? 88.f : x);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float value = (p * r * r + r + 1.f) * std::bit_cast<float>((int32_t(n) + 127) << 23);
  return none ? 0.f : value;
}
inline double exponential(double x) { return std::exp(x); }

// Whether an array is large enough for several threads.
inline bool large(int64_t numbers) { return numbers > (1 << 14); }

// Number of values of the type of sums in 64 bytes.
template <class T> constexpr int64_t LANES = 64 / sizeof(wide<T>);
template <class T> struct Vector { typedef wide<T> type __attribute__((vector_size(64))); };
template <class T> using vec = typename Vector<T>::type;
typedef uint16_t half16 __attribute__((vector_size(32)));
typedef uint32_t word16 __attribute__((vector_size(64)));

template <class T> inline vec<T> load_vector(const T* p) {
  vec<T> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <> inline vec<bf16> load_vector<bf16>(const bf16* p) {
  half16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return std::bit_cast<vec<bf16>>(__builtin_convertvector(bits, word16) << 16);
}

template <class T> inline void store_vector(T* p, vec<T> x) { std::memcpy(p, &x, sizeof x); }
template <> inline void store_vector<bf16>(bf16* p, vec<bf16> x) {
#ifdef __AVX512BF16__
  const __m256bh halves = _mm512_cvtneps_pbh(__m512(x));
#else
  const word16 bits = std::bit_cast<word16>(x);
  const word16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const half16 halves = __builtin_convertvector(x == x ? rounded : (word16{} + 0x7fc0), half16);
#endif
  std::memcpy(p, &halves, sizeof halves);
}

// Sums of products of STEP numbers at a time. Instructions for bfloat16 read twice as many numbers as the sums have.
template <class T> struct Dot {
  using side = vec<T>;
  static constexpr int64_t STEP = LANES<T>;
  static side take(const T* p) { return load_vector(p); }
  static vec<T> add(vec<T> sum, side a, side b) { return sum + a * b; }
};
#ifdef __AVX512BF16__
template <> struct Dot<bf16> {
  using side = __m512bh;
  static constexpr int64_t STEP = 32;
  static side take(const bf16* p) { return __m512bh(_mm512_loadu_si512(p)); }
  static vec<bf16> add(vec<bf16> sum, side a, side b) { return vec<bf16>(_mm512_dpbf16_ps(__m512(sum), a, b)); }
};
#endif

}  // namespace

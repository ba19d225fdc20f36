// Vectors of sixteen floats: loads, stores, sums, exponentials. Of GCC, which the compiler lowers
// to what the machine has.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct bfloat16 {
  uint16_t bits;
};

// ------------------------------------------------------------------------- loads and stores

Floats splat(float value) { return Floats{} + value; }

Floats load(const float* from) {
  Floats out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

// What bfloat16s are in float32. GCC 12 would convert the halves of a vector one by one.
Floats widened(Halves bits) {
#ifdef __AVX512F__
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#else
  return (Floats)(__builtin_convertvector(bits, Ints) << 16);
#endif
}

Floats load(const bfloat16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return widened(bits);
}

void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// To the nearest, ties to even; a NaN stays one.
void store(bfloat16* to, Floats value) {
#ifdef __AVX512BF16__
  const __m256bh out = _mm512_cvtneps_pbh((__m512)value);
#else
  const Ints bits = (Ints)value;
  const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Ints quiet = (bits >> 16) | 0x40;
  const Halves out = __builtin_convertvector(value == value ? rounded : quiet, Halves);
#endif
  std::memcpy(to, &out, sizeof out);
}

// The first `count` lanes; others are zero, and what lies behind is not touched.
template <class T>
Floats load(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(T));
  return load(lanes);
}

template <class T>
void store(T* to, Floats value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  T lanes[kLanes];
  store(lanes, value);
  std::memcpy(to, lanes, count * sizeof(T));
}

// What `value` becomes by being stored as a T.
template <class T>
Floats rounded(Floats value) {
  T lanes[kLanes];
  store(lanes, value);
  return load(lanes);
}

#ifdef __AVX512BF16__
template <>
inline Floats rounded<bfloat16>(Floats value) {
  return widened((Halves)_mm512_cvtneps_pbh((__m512)value));
}
#endif

float sum(Floats value) {
  float out = 0;
  for (int lane = 0; lane < kLanes; ++lane) out += value[lane];
  return out;
}

Floats at_least(Floats a, Floats b) { return a > b ? a : b; }

inline float highest(Floats value) {
  const Ints halves[4] = {{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7},
                          {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
                          {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
                          {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}};
  for (const Ints& half : halves) value = at_least(value, __builtin_shuffle(value, half));
  return value[0];
}

// e^x to within 2 units in the last place, for x within -87 and 88. Beyond, that of the bound; with
// AVX-512 what float32 has for it, of infinities and of whatever lies within 1e12. Cephes'
// polynomial (Moshier) after the reduction of x by multiples of ln 2.
inline Floats exp(Floats x) {
#ifdef __AVX512F__
  const Floats whole = (Floats)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // rounds: 1.5 * 2^23
  const Floats whole = shifted - 12582912.0f;
#endif
  const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
#ifdef __AVX512F__
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  // The low bits of `shifted` are the multiple: 2 to its power, by adding it to the exponent.
  return (Floats)((Ints)p + ((Ints)shifted << 23));
#endif
}

// Below so many elements one thread is done before another has woken up.
constexpr int64_t kWorthThreads = 16384;

int threads_for(int64_t elements, int threads) {
  return elements < kWorthThreads ? 1 : threads;
}

}  // namespace

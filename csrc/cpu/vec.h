// Vec: W floats, on the instruction set FASTPEFT_ISA names. Loads and stores convert from and to bf16 and fp16 (round
// to nearest even). AVX-512 needs F, BW, DQ and VL; AVX2 needs FMA and F16C; scalar needs nothing.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(FASTPEFT_AVX512) || defined(FASTPEFT_AVX2)
#include <immintrin.h>
#endif

#define FASTPEFT_INLINE static inline __attribute__((always_inline))

namespace fastpeft {
namespace FASTPEFT_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FASTPEFT_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

FASTPEFT_INLINE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

FASTPEFT_INLINE float to_float(float x) { return x; }

FASTPEFT_INLINE float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

FASTPEFT_INLINE float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Exponents are rebiased by a multiplication, which also normalises subnormals: 2^(127 - 15).
  return float_of(sign | bits_of(float_of(rest << 13) * float_of(0x77800000)));
}

FASTPEFT_INLINE void from_float(float x, float* out) { *out = x; }

FASTPEFT_INLINE void from_float(float x, bf16* out) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffff) > 0x7f800000) {
    out->bits = 0x7fc0;
  } else {
    out->bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
}

FASTPEFT_INLINE void from_float(float x, f16* out) {
  uint32_t u = bits_of(x);
  const uint16_t sign = uint16_t(u >> 16) & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) {
    out->bits = sign | 0x7e00;
  } else if (u >= 0x477ff000) {  // 65520 and above round to infinity
    out->bits = sign | 0x7c00;
  } else if (u < 0x38800000) {  // below 2^-14: the addition rounds to units of 2^-24
    out->bits = sign | uint16_t(bits_of(float_of(u) + 0.5f) - bits_of(0.5f));
  } else {
    out->bits = sign | uint16_t((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13);
  }
}

#if defined(FASTPEFT_AVX512)

constexpr int W = 16;
using Vec = __m512;

FASTPEFT_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }

FASTPEFT_INLINE Vec zero() { return _mm512_setzero_ps(); }
FASTPEFT_INLINE Vec set(float x) { return _mm512_set1_ps(x); }
FASTPEFT_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
FASTPEFT_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
FASTPEFT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
FASTPEFT_INLINE float total(Vec x) { return _mm512_reduce_add_ps(x); }

FASTPEFT_INLINE Vec widen(__m256i x, const bf16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FASTPEFT_INLINE Vec widen(__m256i x, const f16*) { return _mm512_cvtph_ps(x); }

FASTPEFT_INLINE __m256i narrow(Vec x, const bf16*) {
  const __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
FASTPEFT_INLINE __m256i narrow(Vec x, const f16*) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FASTPEFT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
FASTPEFT_INLINE Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
FASTPEFT_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
FASTPEFT_INLINE void store(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }

template <typename T>
FASTPEFT_INLINE Vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}
template <typename T>
FASTPEFT_INLINE Vec load(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), p);
}
template <typename T>
FASTPEFT_INLINE void store(T* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, p));
}
template <typename T>
FASTPEFT_INLINE void store(T* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(x, p));
}

// Zero where the bit is 0; bit i of the W bits at `bits` is lane i's.
FASTPEFT_INLINE Vec keep(Vec x, const uint8_t* bits) {
  uint16_t mask;
  memcpy(&mask, bits, 2);
  return _mm512_maskz_mov_ps(mask, x);
}

#elif defined(FASTPEFT_AVX2)

constexpr int W = 8;
using Vec = __m256;

FASTPEFT_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

FASTPEFT_INLINE Vec zero() { return _mm256_setzero_ps(); }
FASTPEFT_INLINE Vec set(float x) { return _mm256_set1_ps(x); }
FASTPEFT_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
FASTPEFT_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
FASTPEFT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
FASTPEFT_INLINE float total(Vec x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

FASTPEFT_INLINE Vec widen(__m128i x, const bf16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
FASTPEFT_INLINE Vec widen(__m128i x, const f16*) { return _mm256_cvtph_ps(x); }

FASTPEFT_INLINE __m128i narrow(Vec x, const bf16*) {
  const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
FASTPEFT_INLINE __m128i narrow(Vec x, const f16*) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FASTPEFT_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
FASTPEFT_INLINE Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
FASTPEFT_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
FASTPEFT_INLINE void store(float* p, Vec x, int n) { _mm256_maskstore_ps(p, first(n), x); }

template <typename T>
FASTPEFT_INLINE Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
}
template <typename T>
FASTPEFT_INLINE Vec load(const T* p, int n) {
  T part[W] = {};
  memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <typename T>
FASTPEFT_INLINE void store(T* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, p));
}
template <typename T>
FASTPEFT_INLINE void store(T* p, Vec x, int n) {
  T part[W];
  store(part, x);
  memcpy(p, part, n * sizeof(T));
}

FASTPEFT_INLINE Vec keep(Vec x, const uint8_t* bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(*bits), lane), lane);
  return _mm256_and_ps(x, _mm256_castsi256_ps(set));
}

#else

// The compiler's own vectors: SSE2, NEON or whatever the baseline has.
constexpr int W = 8;
typedef float Vec __attribute__((vector_size(32)));

FASTPEFT_INLINE Vec zero() { return Vec{}; }
FASTPEFT_INLINE Vec set(float x) { return Vec{x, x, x, x, x, x, x, x}; }
FASTPEFT_INLINE Vec add(Vec a, Vec b) { return a + b; }
FASTPEFT_INLINE Vec mul(Vec a, Vec b) { return a * b; }
FASTPEFT_INLINE Vec fma(Vec a, Vec b, Vec c) { return c + a * b; }
FASTPEFT_INLINE float total(Vec x) {
  return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

template <typename T>
FASTPEFT_INLINE Vec load(const T* p, int n) {
  Vec v = zero();
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}
template <typename T>
FASTPEFT_INLINE Vec load(const T* p) {
  return load(p, W);
}
template <typename T>
FASTPEFT_INLINE void store(T* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) from_float(x[i], p + i);
}
template <typename T>
FASTPEFT_INLINE void store(T* p, Vec x) {
  store(p, x, W);
}

FASTPEFT_INLINE Vec keep(Vec x, const uint8_t* bits) {
  typedef int32_t Int __attribute__((vector_size(32)));
  const int32_t b = *bits;
  const Int lane = {1, 2, 4, 8, 16, 32, 64, 128}, all = {b, b, b, b, b, b, b, b};
  return (Vec)((Int)x & ((all & lane) != 0));
}

#endif

// The first n lanes, n known to be W in a full step.
template <typename T>
FASTPEFT_INLINE Vec load_some(const T* p, int n) {
  return n == W ? load(p) : load(p, n);
}

template <typename T>
FASTPEFT_INLINE void store_some(T* p, Vec x, int n) {
  n == W ? store(p, x) : store(p, x, n);
}

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft

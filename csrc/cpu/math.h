// exp, the logistic function, tanh and the normal distribution on Vec. Relative errors against float64 stay below 6e-7, in
// the far tails too (tests/ops/test_glu_kernels.py). Overflow, underflow, infinities and NaN are as in libm, except that
// results below 2^-126 may be 0.
//
// The polynomials are minimax fits made for this file.
#pragma once

#include "vec.h"

namespace fastpeft {
namespace FASTPEFT_ISA {

#if defined(FASTPEFT_AVX512)

FASTPEFT_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
FASTPEFT_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// Of two operands of which one is NaN, the second.
FASTPEFT_INLINE Vec least(Vec a, Vec b) { return _mm512_min_ps(a, b); }
FASTPEFT_INLINE Vec greatest(Vec a, Vec b) { return _mm512_max_ps(a, b); }
FASTPEFT_INLINE Vec absolute(Vec a) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), a); }
FASTPEFT_INLINE Vec with_sign(Vec a, Vec sign) { return _mm512_or_ps(a, _mm512_and_ps(_mm512_set1_ps(-0.0f), sign)); }
// x < limit ? yes : no
FASTPEFT_INLINE Vec below(Vec x, Vec limit, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), no, yes);
}
FASTPEFT_INLINE Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x 2^n for an integer n
FASTPEFT_INLINE Vec scaled(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

#elif defined(FASTPEFT_AVX2)

FASTPEFT_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
FASTPEFT_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
FASTPEFT_INLINE Vec least(Vec a, Vec b) { return _mm256_min_ps(a, b); }
FASTPEFT_INLINE Vec greatest(Vec a, Vec b) { return _mm256_max_ps(a, b); }
FASTPEFT_INLINE Vec absolute(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
FASTPEFT_INLINE Vec with_sign(Vec a, Vec sign) { return _mm256_or_ps(a, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign)); }
FASTPEFT_INLINE Vec below(Vec x, Vec limit, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, limit, _CMP_LT_OQ));
}
FASTPEFT_INLINE Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTPEFT_INLINE Vec scaled(Vec x, Vec n) {
  // In two steps: 2^n itself may lie outside the normal numbers.
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const Vec first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const Vec second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(x, first), second);
}

#else

typedef int32_t IntVec __attribute__((vector_size(32)));

FASTPEFT_INLINE Vec choose(IntVec mask, Vec yes, Vec no) { return (Vec)(((IntVec)yes & mask) | ((IntVec)no & ~mask)); }
FASTPEFT_INLINE Vec sub(Vec a, Vec b) { return a - b; }
FASTPEFT_INLINE Vec div(Vec a, Vec b) { return a / b; }
FASTPEFT_INLINE Vec least(Vec a, Vec b) { return choose(a < b, a, b); }
FASTPEFT_INLINE Vec greatest(Vec a, Vec b) { return choose(a > b, a, b); }
FASTPEFT_INLINE Vec absolute(Vec a) { return (Vec)((IntVec)a & 0x7fffffff); }
FASTPEFT_INLINE Vec with_sign(Vec a, Vec sign) { return (Vec)((IntVec)a | ((IntVec)sign & ~0x7fffffff)); }
FASTPEFT_INLINE Vec below(Vec x, Vec limit, Vec yes, Vec no) { return choose(x < limit, yes, no); }
FASTPEFT_INLINE Vec nearest(Vec x) {  // for |x| < 2^22
  const Vec magic = set(12582912.0f);
  return (x + magic) - magic;
}
FASTPEFT_INLINE Vec scaled(Vec x, Vec n) {
  const IntVec whole = __builtin_convertvector(n, IntVec), half = whole >> 1, rest = whole - half;
  return x * (Vec)((half + 127) << 23) * (Vec)((rest + 127) << 23);
}

#endif

// x² = *rounded + *rest
FASTPEFT_INLINE void exact_square(Vec x, Vec* rounded, Vec* rest) {
  *rounded = mul(x, x);
#if defined(FASTPEFT_AVX512)
  *rest = _mm512_fmsub_ps(x, x, *rounded);
#elif defined(FASTPEFT_AVX2)
  *rest = _mm256_fmsub_ps(x, x, *rounded);
#else
  const Vec head = (Vec)((IntVec)x & ~0xfff), tail = x - head;
  *rest = ((head * head - *rounded) + 2 * (head * tail)) + tail * tail;
#endif
}

constexpr float MINUS_INFINITY = -__builtin_inff();

FASTPEFT_INLINE float greatest_lane(Vec x) {
  float lanes[W], most = MINUS_INFINITY;
  store(lanes, x);
  for (int i = 0; i < W; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// e^x: n = round(x / ln 2), e^(x - n ln 2) by a polynomial, times 2^n.
FASTPEFT_INLINE Vec exp(Vec x) {
  x = least(set(89.0f), greatest(set(-104.0f), x));  // beyond, the result is infinity or 0 and n is small enough
  const Vec n = nearest(mul(x, set(1.44269504f)));
  // ln 2 in two parts; n times the first is exact.
  const Vec r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), x));
  Vec p = set(0.001381455920636654f);
  p = fma(p, r, set(0.008368735201656818f));
  p = fma(p, r, set(0.04166838899254799f));
  p = fma(p, r, set(0.1666652113199234f));
  p = fma(p, r, set(0.4999999403953552f));
  p = fma(p, mul(r, r), r);
  return scaled(add(p, set(1.0f)), n);
}

// 1 / (1 + e^-x)
FASTPEFT_INLINE Vec sigmoid(Vec x) {
  const Vec one = set(1.0f);
  return div(one, add(one, exp(sub(zero(), x))));
}

// The same, and *rest = 1 - it without the cancellation; *rest is 0 instead of 1 where the result is 0.
FASTPEFT_INLINE Vec sigmoid(Vec x, Vec* rest) {
  const Vec one = set(1.0f), e = exp(sub(zero(), x)), s = div(one, add(one, e));
  *rest = mul(least(set(1e38f), e), s);
  return s;
}

FASTPEFT_INLINE Vec tanh(Vec x) {
  const Vec a = absolute(x), z = mul(x, x), one = set(1.0f);
  Vec p = set(-0.005905868485569954f);
  p = fma(p, z, set(0.02080538496375084f));
  p = fma(p, z, set(-0.053786683827638626f));
  p = fma(p, z, set(0.13331958651542664f));
  p = fma(p, z, set(-0.33333298563957214f));
  const Vec small = fma(mul(p, z), x, x);
  const Vec large = sub(one, div(set(2.0f), add(exp(add(a, a)), one)));
  return below(a, set(0.6f), small, with_sign(large, x));
}

// The normal distribution at x, Φ = (1 + erf(x/√2))/2, and its density φ = e^(-x²/2)/√(2π).
//
// In the tail Φ(-t) = e^(-t²/2) R(t), R(t) = erfcx(t/√2)/2 smooth: a polynomial in (t - 4)/(t + 4).
FASTPEFT_INLINE void normal(Vec x, Vec* distribution, Vec* density) {
  const Vec t = least(set(15.0f), absolute(x)), k = set(4.0f), half = set(-0.5f);
  Vec square, rest;
  exact_square(t, &square, &rest);
  Vec e = exp(mul(half, square));
  e = fma(mul(e, half), rest, e);
  const Vec y = div(sub(t, k), add(t, k));
  Vec p = set(1.1893437658727635e-05f);
  p = fma(p, y, set(-4.712224836112e-05f));
  p = fma(p, y, set(-0.00017334440781269222f));
  p = fma(p, y, set(0.0006419993587769568f));
  p = fma(p, y, set(0.0005028091254644096f));
  p = fma(p, y, set(-0.008493082597851753f));
  p = fma(p, y, set(0.030865546315908432f));
  p = fma(p, y, set(-0.07170731574296951f));
  p = fma(p, y, set(0.12437921017408371f));
  p = fma(p, y, set(-0.17039772868156433f));
  p = fma(p, y, set(0.09441064298152924f));
  const Vec tail = mul(e, p);
  *distribution = below(x, zero(), tail, sub(set(1.0f), tail));
  *density = mul(e, set(0.3989422804f));
}

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft

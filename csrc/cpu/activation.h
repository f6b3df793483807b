// sigmoid, tanh and relu of a vector, finite and accurate to a few units in the last place for any input; NaN stays NaN.
//
//   exp(x) = 2^n * 2^r,  n = round(x / ln 2),  |r| <= 1/2,  2^r - 1 = r * polynomial(r)
//
// tanh uses exp(x) - 1 instead of exp(x), which keeps its relative accuracy near 0.
#pragma once

#include "vec.h"

namespace pyarch {

// Beyond this, sigmoid and tanh are constant in float32, and within it no power of two leaves its normal range.
constexpr float SATURATED = 87.0f;

// (2^r - 1) / r, least squares at Chebyshev points of [-1/2, 1/2]: relative error 1.3e-8.
ALWAYS_INLINE Vec power_of_two_slope(Vec r) {
  Vec slope = broadcast(1.5461447567e-4f);
  for (float coefficient :
       {1.3390866807e-3f, 9.6180569381e-3f, 5.5503569543e-2f, 2.4022650719e-1f, 6.9314718246e-1f})
    slope = fma(slope, r, broadcast(coefficient));
  return slope;
}

#if defined(__AVX512F__)

// NaN passes: it is the operand that the instruction returns when the two are unordered.
ALWAYS_INLINE Vec clamp(Vec v, float limit) {
  return _mm512_min_ps(broadcast(limit), _mm512_max_ps(broadcast(-limit), v));
}
ALWAYS_INLINE Vec round_to_integer(Vec v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ALWAYS_INLINE Vec times_power_of_two(Vec v, Vec integer) { return _mm512_scalef_ps(v, integer); }
ALWAYS_INLINE Vec reciprocal(Vec v) {
  const Vec guess = _mm512_rcp14_ps(v);
  return fma(_mm512_fnmadd_ps(v, guess, broadcast(1.0f)), guess, guess);
}
ALWAYS_INLINE Vec negative(Vec v) { return _mm512_xor_ps(v, broadcast(-0.0f)); }
ALWAYS_INLINE Vec magnitude(Vec v) { return _mm512_andnot_ps(broadcast(-0.0f), v); }
ALWAYS_INLINE Vec with_sign_of(Vec v, Vec sign) {
  return _mm512_or_ps(v, _mm512_and_ps(sign, broadcast(-0.0f)));
}
ALWAYS_INLINE Vec positive_part(Vec v) { return _mm512_max_ps(zero(), v); }
ALWAYS_INLINE Vec where_positive(Vec condition, Vec v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(condition, zero(), _CMP_NLE_UQ), v);
}

#else

ALWAYS_INLINE Vec clamp(Vec v, float limit) {
  return _mm256_min_ps(broadcast(limit), _mm256_max_ps(broadcast(-limit), v));
}
ALWAYS_INLINE Vec round_to_integer(Vec v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
ALWAYS_INLINE Vec times_power_of_two(Vec v, Vec integer) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(integer), 23);
  return mul(v, _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_castps_si256(broadcast(1.0f)))));
}
ALWAYS_INLINE Vec reciprocal(Vec v) { return _mm256_div_ps(broadcast(1.0f), v); }
ALWAYS_INLINE Vec negative(Vec v) { return _mm256_xor_ps(v, broadcast(-0.0f)); }
ALWAYS_INLINE Vec magnitude(Vec v) { return _mm256_andnot_ps(broadcast(-0.0f), v); }
ALWAYS_INLINE Vec with_sign_of(Vec v, Vec sign) {
  return _mm256_or_ps(v, _mm256_and_ps(sign, broadcast(-0.0f)));
}
ALWAYS_INLINE Vec positive_part(Vec v) { return _mm256_max_ps(zero(), v); }
ALWAYS_INLINE Vec where_positive(Vec condition, Vec v) {
  return _mm256_and_ps(_mm256_cmp_ps(condition, zero(), _CMP_NLE_UQ), v);
}

#endif

struct PowerOfTwo {
  Vec integer, less_one;  // 2^y = 2^integer * (1 + less_one)
};

// exp(x) for |x| <= SATURATED.
ALWAYS_INLINE PowerOfTwo exponential(Vec x) {
  const Vec log2_e = broadcast(1.44269504089f);
  const Vec integer = round_to_integer(mul(x, log2_e));
  const Vec r = fma(x, log2_e, negative(integer));
  return {integer, mul(r, power_of_two_slope(r))};
}

ALWAYS_INLINE Vec sigmoid(Vec x) {
  const Vec one = broadcast(1.0f);
  const PowerOfTwo e = exponential(negative(clamp(x, SATURATED)));
  return reciprocal(add(one, times_power_of_two(add(one, e.less_one), e.integer)));
}

// tanh(|x|) = -m / (2 + m), m = exp(-2 |x|) - 1.
ALWAYS_INLINE Vec hyperbolic_tangent(Vec x) {
  const Vec one = broadcast(1.0f);
  const Vec bounded = magnitude(clamp(x, SATURATED / 2));
  const PowerOfTwo e = exponential(mul(bounded, broadcast(-2.0f)));
  const Vec power = times_power_of_two(one, e.integer);
  const Vec less_one = fma(power, e.less_one, sub(power, one));
  return with_sign_of(mul(negative(less_one), reciprocal(add(broadcast(2.0f), less_one))), x);
}

}  // namespace pyarch

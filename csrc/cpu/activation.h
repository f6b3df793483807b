// sigmoid, tanh and relu of a vector, finite and accurate to a few units in the last place for any input; NaN stays NaN.
//
//   exp(x) = 2^n * exp(r),  n = round(x / ln 2),  |r| <= ln(2) / 2,  exp(r) - 1 = r + r^2 * polynomial(r)
//
// tanh uses exp(x) - 1 instead of exp(x), which keeps its relative accuracy near 0.
#pragma once

#include "vec.h"

namespace pyarch {

// Beyond this, sigmoid and tanh are constant in float32, and within it no power of two leaves its normal range.
constexpr float SATURATED = 87.0f;

// (exp(r) - 1 - r) / r^2, least squares at Chebyshev points: relative error of exp(r) - 1 below 3e-8.
ALWAYS_INLINE Vec curvature(Vec r) {
  Vec sum = broadcast(1.393365208e-3f);
  for (float coefficient : {8.363181725e-3f, 4.166646674e-2f, 1.666657627e-1f, 5.0e-1f})
    sum = fma(sum, r, broadcast(coefficient));
  return sum;
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
// Two refinements: the first is good to 28 bits but for its own rounding, which the second takes back.
ALWAYS_INLINE Vec reciprocal(Vec v) {
  const Vec one = broadcast(1.0f);
  Vec guess = _mm512_rcp14_ps(v);
  guess = fma(_mm512_fnmadd_ps(v, guess, one), guess, guess);
  return fma(_mm512_fnmadd_ps(v, guess, one), guess, guess);
}
ALWAYS_INLINE Vec negative(Vec v) { return _mm512_xor_ps(v, broadcast(-0.0f)); }
ALWAYS_INLINE Vec magnitude(Vec v) { return _mm512_andnot_ps(broadcast(-0.0f), v); }
ALWAYS_INLINE Vec with_sign_of(Vec v, Vec sign) {
  return _mm512_or_ps(v, _mm512_and_ps(sign, broadcast(-0.0f)));
}
ALWAYS_INLINE Vec where_above(Vec v, float bound, Vec above, Vec below) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(v, broadcast(bound), _CMP_GT_OQ), below, above);
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
ALWAYS_INLINE Vec where_above(Vec v, float bound, Vec above, Vec below) {
  return _mm256_blendv_ps(below, above, _mm256_cmp_ps(v, broadcast(bound), _CMP_GT_OQ));
}
ALWAYS_INLINE Vec positive_part(Vec v) { return _mm256_max_ps(zero(), v); }
ALWAYS_INLINE Vec where_positive(Vec condition, Vec v) {
  return _mm256_and_ps(_mm256_cmp_ps(condition, zero(), _CMP_NLE_UQ), v);
}

#endif

struct Exponential {
  Vec integer, less_one;  // 2^integer * (1 + less_one)
};

// exp(x) for |x| <= SATURATED. ln 2 is taken off in two parts, the first of which has few enough bits to be exact.
ALWAYS_INLINE Exponential exponential(Vec x) {
  const Vec minus_integer = round_to_integer(mul(x, broadcast(-1.44269504089f)));
  Vec r = fma(minus_integer, broadcast(0.693359375f), x);
  r = fma(minus_integer, broadcast(-2.12194440e-4f), r);
  return {negative(minus_integer), fma(mul(r, r), curvature(r), r)};
}

ALWAYS_INLINE Vec sigmoid(Vec x) {
  const Vec one = broadcast(1.0f);
  const Exponential e = exponential(negative(clamp(x, SATURATED)));
  const Vec s = reciprocal(add(one, times_power_of_two(add(one, e.less_one), e.integer)));
  return where_above(negative(x), SATURATED, zero(), s);
}

// With m = exp(-2 |x|) - 1, tanh(|x|) is -m / (2 + m), accurate near 0, and 1 - 2 (1 + m) / (2 + m), accurate near 1.
ALWAYS_INLINE Vec hyperbolic_tangent(Vec x) {
  const Vec one = broadcast(1.0f), two = broadcast(2.0f);
  const Vec bounded = magnitude(clamp(x, SATURATED / 2));
  const Exponential e = exponential(mul(bounded, negative(two)));
  const Vec power = times_power_of_two(one, e.integer);
  const Vec m = fma(power, e.less_one, sub(power, one));
  const Vec inverse = reciprocal(add(two, m));
  const Vec estimate = mul(sub(zero(), m), inverse);
  const Vec quotient = fma(fma(negative(estimate), add(two, m), sub(zero(), m)), inverse, estimate);
  const Vec near_one = fma(mul(negative(two), fma(power, e.less_one, power)), inverse, one);
  return with_sign_of(where_above(bounded, 0.5f, near_one, quotient), x);
}

// For elements T; those of bfloat16 leave room for fewer terms.
template <class T>
ALWAYS_INLINE Vec sigmoid_of(Vec x) {
  return sigmoid(x);
}
template <class T>
ALWAYS_INLINE Vec hyperbolic_tangent_of(Vec x) {
  return hyperbolic_tangent(x);
}

#if defined(__AVX512F__)

// 2^x = 2^integer * (1 + less_one), for any x, NaN and infinities too: 2^r - 1 within 2e-5 of itself, |r| <= 1/2.
ALWAYS_INLINE Exponential short_power_of_two(Vec x) {
  const Vec r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  Vec sum = broadcast(9.666373693e-03f);
  for (float coefficient : {5.583834273e-02f, 2.402234894e-01f, 6.931367264e-01f})
    sum = fma(sum, r, broadcast(coefficient));
  return {sub(x, r), mul(sum, r)};
}
// One refinement of what is good to 14 bits, so that a saturated gate is no less than 1.
ALWAYS_INLINE Vec short_reciprocal(Vec v) {
  const Vec guess = _mm512_rcp14_ps(v);
  return fma(_mm512_fnmadd_ps(v, guess, broadcast(1.0f)), guess, guess);
}

// The bounds keep what is divided by finite.
template <>
ALWAYS_INLINE Vec sigmoid_of<bfloat16>(Vec x) {
  const Vec one = broadcast(1.0f);
  const Exponential e = short_power_of_two(_mm512_min_ps(broadcast(125.0f), mul(x, broadcast(-1.44269504f))));
  return short_reciprocal(add(one, times_power_of_two(add(one, e.less_one), e.integer)));
}
template <>
ALWAYS_INLINE Vec hyperbolic_tangent_of<bfloat16>(Vec x) {
  const Vec one = broadcast(1.0f);
  const Exponential e = short_power_of_two(_mm512_min_ps(broadcast(60.0f), mul(x, broadcast(2.88539008f))));
  const Vec power = times_power_of_two(one, e.integer);
  const Vec m = fma(power, e.less_one, sub(power, one));
  return mul(m, short_reciprocal(add(broadcast(2.0f), m)));
}

#endif

}  // namespace pyarch

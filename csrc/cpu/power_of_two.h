// 2^x of a vector: 2^n * 2^r with n = round(x), |r| <= 1/2, and 2^r by a polynomial of least largest relative error,
// 7.5e-8.
//
// NaN stays NaN; below the smallest normal number the result is 0, of -infinity too.
#pragma once

#include "activation.h"

namespace pyarch {

constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.69314718055994531f;
constexpr float SMALLEST_EXPONENT = -126.0f;

ALWAYS_INLINE Vec power_of_two(Vec x) {
#if defined(__AVX512F__)
  const Vec n = round_to_integer(x), r = sub(x, n);
#else
  const Vec n = round_to_integer(larger_of(broadcast(SMALLEST_EXPONENT), x)), r = sub(x, n);
#endif
  Vec power = broadcast(1.327647174e-3f);
  for (float coefficient : {9.675541540e-3f, 5.550713276e-2f, 2.402211972e-1f, 6.931469671e-1f, 1.000000072f})
    power = fma(power, r, broadcast(coefficient));
#if defined(__AVX512F__)
  const Mask normal = _mm512_cmp_ps_mask(x, broadcast(SMALLEST_EXPONENT), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, power, n);
#else
  const Vec normal = _mm256_cmp_ps(x, broadcast(SMALLEST_EXPONENT), _CMP_NLT_UQ);
  return _mm256_and_ps(normal, times_power_of_two(power, n));
#endif
}

}  // namespace pyarch

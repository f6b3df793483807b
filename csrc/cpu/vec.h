// One vector of float32 lanes, as wide as the instruction set this file is compiled for.
//
// Kernels are written once over this type and compiled once per instruction set, each into its own library.
// 16-bit elements are widened to float32 at the load and rounded to nearest even at the store.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <utility>

#define ALWAYS_INLINE inline __attribute__((always_inline))
// The same of a lambda.
#define INLINED __attribute__((always_inline))

namespace pyarch {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

ALWAYS_INLINE float to_float(float value) { return value; }
ALWAYS_INLINE float to_float(bfloat16 value) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int(uint32_t(value.bits) << 16))));
}
ALWAYS_INLINE float to_float(float16 value) { return _cvtsh_ss(value.bits); }

// Keeps a loaded vector in its register. Otherwise GCC folds the load into every instruction that uses it, and reads
// memory as often.
#define IN_REGISTER(vector) asm("" : "+v"(vector))

// Calls body(integral_constant<0>) ... body(integral_constant<Count - 1>), unrolled: arrays indexed by the argument
// stay in registers.
template <int Count, class Body>
ALWAYS_INLINE void unrolled(Body&& body) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      INLINED { (body(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, Count>{});
}

#if defined(__AVX512F__)

constexpr int LANES = 16;
constexpr int REGISTERS = 32;
using Vec = __m512;
using Mask = __mmask16;

ALWAYS_INLINE Mask first_lanes(int64_t count) { return count >= LANES ? Mask(-1) : Mask((1u << count) - 1); }
ALWAYS_INLINE Vec zero() { return _mm512_setzero_ps(); }
ALWAYS_INLINE Vec broadcast(float value) { return _mm512_set1_ps(value); }
ALWAYS_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
ALWAYS_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
ALWAYS_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
ALWAYS_INLINE Vec larger_of(Vec a, Vec b) { return _mm512_max_ps(a, b); }
ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec sum) { return _mm512_fmadd_ps(a, b, sum); }
ALWAYS_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }

ALWAYS_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
ALWAYS_INLINE Vec load(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
ALWAYS_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
ALWAYS_INLINE void store(float* p, Vec v, Mask mask) { _mm512_mask_storeu_ps(p, mask, v); }
ALWAYS_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v); }

ALWAYS_INLINE Vec widen_bfloat16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
ALWAYS_INLINE Vec load(const bfloat16* p) {
  return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ALWAYS_INLINE Vec load(const bfloat16* p, Mask mask) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16(mask, p));
}
ALWAYS_INLINE Vec load(const float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ALWAYS_INLINE Vec load(const float16* p, Mask mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
}

ALWAYS_INLINE __m256i narrow_bfloat16(Vec v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
#endif
}
ALWAYS_INLINE __m256i narrow_float16(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
ALWAYS_INLINE void store(bfloat16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16(v));
}
ALWAYS_INLINE void store(bfloat16* p, Vec v, Mask mask) {
  _mm256_mask_storeu_epi16(p, mask, narrow_bfloat16(v));
}
ALWAYS_INLINE void store(float16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_float16(v));
}
ALWAYS_INLINE void store(float16* p, Vec v, Mask mask) {
  _mm256_mask_storeu_epi16(p, mask, narrow_float16(v));
}

// Elements 0, 2, 4 ... and 1, 3, 5 ... of 2 * LANES floats, and back.
ALWAYS_INLINE Vec even_elements(Vec a, Vec b) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(a, evens, b);
}
ALWAYS_INLINE Vec odd_elements(Vec a, Vec b) {
  const __m512i odds = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_permutex2var_ps(a, odds, b);
}
ALWAYS_INLINE void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = _mm512_permutex2var_ps(even, first, odd);
  high = _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd);
}

// Row i of a square becomes its column i: 32-bit elements, swapped in pairs, in fours, then whole 128-bit quarters.
ALWAYS_INLINE void transpose(Vec (&rows)[LANES]) {
  Vec pairs[LANES], fours[LANES], eights[LANES];
  unrolled<LANES / 2>([&](auto i) {
    pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  });
  const auto unpack_low = [](Vec a, Vec b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto unpack_high = [](Vec a, Vec b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  unrolled<LANES / 4>([&](auto i) {
    fours[4 * i] = unpack_low(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 1] = unpack_high(pairs[4 * i], pairs[4 * i + 2]);
    fours[4 * i + 2] = unpack_low(pairs[4 * i + 1], pairs[4 * i + 3]);
    fours[4 * i + 3] = unpack_high(pairs[4 * i + 1], pairs[4 * i + 3]);
  });
  unrolled<4>([&](auto i) {
    eights[i] = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0x88);
    eights[i + 4] = _mm512_shuffle_f32x4(fours[i], fours[i + 4], 0xdd);
    eights[i + 8] = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0x88);
    eights[i + 12] = _mm512_shuffle_f32x4(fours[i + 8], fours[i + 12], 0xdd);
  });
  unrolled<8>([&](auto i) {
    rows[i] = _mm512_shuffle_f32x4(eights[i], eights[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(eights[i], eights[i + 8], 0xdd);
  });
}

#if defined(__AVX512BF16__)

// LANES pairs of bfloat16: neighbours in memory, the first in the lower half; or one element each of two rows.
// Elements out of count or mask are zero.
ALWAYS_INLINE Vec load_pairs(const bfloat16* p, int64_t elements = 2 * LANES) {
  const __mmask32 mask = elements >= 2 * LANES ? __mmask32(-1) : (__mmask32(1) << elements) - 1;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
}
ALWAYS_INLINE Vec load_pairs(const bfloat16* first, Mask firsts, const bfloat16* second, Mask seconds) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(firsts, first));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(seconds, second));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// sum + a[0] * b[0] + a[1] * b[1] in each lane.
ALWAYS_INLINE Vec dot_pairs(Vec a, Vec b, Vec sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

#endif

#else

constexpr int LANES = 8;
constexpr int REGISTERS = 16;
using Vec = __m256;

// A mask that remembers its count: AVX2 has no masked 16-bit access, those go element by element.
struct Mask {
  int count;
};

ALWAYS_INLINE Mask first_lanes(int64_t count) { return {count >= LANES ? LANES : int(count)}; }
ALWAYS_INLINE __m256i lanes_of(Mask mask) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(mask.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
ALWAYS_INLINE Vec zero() { return _mm256_setzero_ps(); }
ALWAYS_INLINE Vec broadcast(float value) { return _mm256_set1_ps(value); }
ALWAYS_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
ALWAYS_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
ALWAYS_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
ALWAYS_INLINE Vec larger_of(Vec a, Vec b) { return _mm256_max_ps(a, b); }
ALWAYS_INLINE Vec fma(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
ALWAYS_INLINE float sum(Vec v) {
  const __m128 halves = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}

ALWAYS_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
ALWAYS_INLINE Vec load(const float* p, Mask mask) { return _mm256_maskload_ps(p, lanes_of(mask)); }
ALWAYS_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
ALWAYS_INLINE void store(float* p, Vec v, Mask mask) { _mm256_maskstore_ps(p, lanes_of(mask), v); }
ALWAYS_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, v); }

ALWAYS_INLINE Vec widen(__m128i bits, bfloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
ALWAYS_INLINE Vec widen(__m128i bits, float16) { return _mm256_cvtph_ps(bits); }
ALWAYS_INLINE __m128i narrow(Vec v, bfloat16) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  const __m256 result = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan);
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(result), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
ALWAYS_INLINE __m128i narrow(Vec v, float16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

template <class Half>
ALWAYS_INLINE Vec load(const Half* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Half{});
}
template <class Half>
ALWAYS_INLINE Vec load(const Half* p, Mask mask) {
  Half block[LANES] = {};
  for (int i = 0; i < mask.count; ++i) block[i] = p[i];
  return load(block);
}
template <class Half>
ALWAYS_INLINE void store(Half* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, Half{}));
}
template <class Half>
ALWAYS_INLINE void store(Half* p, Vec v, Mask mask) {
  Half block[LANES];
  store(block, v);
  for (int i = 0; i < mask.count; ++i) p[i] = block[i];
}

ALWAYS_INLINE Vec ascending_pairs(Vec v) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), _MM_SHUFFLE(3, 1, 2, 0)));
}
ALWAYS_INLINE Vec even_elements(Vec a, Vec b) {
  return ascending_pairs(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)));
}
ALWAYS_INLINE Vec odd_elements(Vec a, Vec b) {
  return ascending_pairs(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
}
ALWAYS_INLINE void interleave(Vec even, Vec odd, Vec& low, Vec& high) {
  const Vec a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
  low = _mm256_permute2f128_ps(a, b, 0x20);
  high = _mm256_permute2f128_ps(a, b, 0x31);
}

ALWAYS_INLINE void transpose(Vec (&rows)[LANES]) {
  Vec pairs[LANES], fours[LANES];
  unrolled<LANES / 2>([&](auto i) {
    pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  });
  unrolled<LANES / 4>([&](auto i) {
    fours[4 * i] = _mm256_shuffle_ps(pairs[4 * i], pairs[4 * i + 2], 0x44);
    fours[4 * i + 1] = _mm256_shuffle_ps(pairs[4 * i], pairs[4 * i + 2], 0xee);
    fours[4 * i + 2] = _mm256_shuffle_ps(pairs[4 * i + 1], pairs[4 * i + 3], 0x44);
    fours[4 * i + 3] = _mm256_shuffle_ps(pairs[4 * i + 1], pairs[4 * i + 3], 0xee);
  });
  unrolled<LANES / 2>([&](auto i) {
    rows[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  });
}

#endif

ALWAYS_INLINE void deinterleave(const float* p, float* even, float* odd) {
  const Vec a = load(p), b = load(p + LANES);
  store(even, even_elements(a, b));
  store(odd, odd_elements(a, b));
}

// The sum of each of LANES vectors, in the lane of its number.
ALWAYS_INLINE Vec sum_each(Vec (&rows)[LANES]) {
  Vec twos[LANES / 2], fours[LANES / 4];
#if defined(__AVX512F__)
  unrolled<LANES / 2>([&](auto i) {
    const Vec a = rows[2 * i], b = rows[2 * i + 1];
    twos[i] = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  });
  unrolled<LANES / 4>([&](auto i) {
    const __m512d a = _mm512_castps_pd(twos[2 * i]), b = _mm512_castps_pd(twos[2 * i + 1]);
    fours[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  });
  const auto halve = [](Vec a, Vec b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return halve(halve(fours[0], fours[1]), halve(fours[2], fours[3]));
#else
  unrolled<LANES / 2>([&](auto i) { twos[i] = _mm256_hadd_ps(rows[2 * i], rows[2 * i + 1]); });
  unrolled<LANES / 4>([&](auto i) { fours[i] = _mm256_hadd_ps(twos[2 * i], twos[2 * i + 1]); });
  return add(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
             _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
#endif
}

// One float rounded to an element.
template <class T>
ALWAYS_INLINE void from_float(float value, T& to) {
  store(&to, broadcast(value), first_lanes(1));
}

}  // namespace pyarch

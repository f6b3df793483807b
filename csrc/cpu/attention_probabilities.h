// From scores to probabilities: the steps that forward, backward and weights share, a row of a strip at a time.
//
//   x = softcap * tanh(scale * s / softcap) + bias + distance_bias,   p = 2^(x / ln 2 - shift)
#pragma once

#include <cmath>

#include "attention.h"
#include "attention_sight.h"
#include "philox.h"
#include "power_of_two.h"

namespace pyarch {

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
// Stands in for it where a row has seen nothing, so that no difference is NaN.
constexpr float LOWEST = -1e30f;

// The lanes that a byte each says yes to.
#if defined(__AVX512F__)
ALWAYS_INLINE Vec where(const uint8_t* bytes, Vec yes, Vec no) {
  const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm512_mask_blend_ps(_mm_test_epi8_mask(loaded, loaded), no, yes);
}
#else
ALWAYS_INLINE Vec where(const uint8_t* bytes, Vec yes, Vec no) {
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return _mm256_blendv_ps(yes, no, _mm256_castsi256_ps(_mm256_cmpeq_epi32(lanes, _mm256_setzero_si256())));
}
#endif

#if defined(__AMX_BF16__)

// 2^x to 2.6e-6, for what is rounded to bfloat16. Only where subnormal numbers are flushed to zero, see TileRegisters:
// there 2^x needs no care below the smallest normal number.
ALWAYS_INLINE Vec flushed_power_of_two(Vec x) {
  const Vec fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec power = broadcast(1.353416787e-2f);
  for (float coefficient : {5.201146278e-2f, 2.414427539e-1f, 6.930038356e-1f, 1.000002593f})
    power = fma(power, fraction, broadcast(coefficient));
  return _mm512_scalef_ps(power, x);
}

// Two vectors, one behind the other.
ALWAYS_INLINE __m512i narrow_both(Vec low, Vec high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

#endif

// LANES values of a row that may be broadcast or strided, widened; those from `count` on are zero.
template <class T>
ALWAYS_INLINE Vec load_strided(const T* row, int64_t stride, int64_t count) {
  if (count <= 0) return zero();
  if (stride == 1) return count >= LANES ? load(row) : load(row, first_lanes(count));
  if (stride == 0) return broadcast(to_float(*row));
  float values[LANES] = {};
  for (int64_t lane = 0; lane < std::min<int64_t>(LANES, count); ++lane)
    values[lane] = to_float(row[lane * stride]);
  return load(values);
}

// One call's arithmetic on scores.
template <class T>
struct ScoreRule {
  const AttentionScores<T>& scores;

  // Whether a positive factor is all that stands between a product and its exponent.
  bool is_plain() const {
    return scores.softcap == 0 && scores.scale > 0 && !scores.bias.data && !scores.float_bias.data &&
           !scores.distance_bias.data;
  }
  float factor() const { return scores.scale * LOG2_E; }

  struct Biases {
    const T* own = nullptr;
    const float *single = nullptr, *of_distance = nullptr;
    int64_t own_stride = 0, single_stride = 0;

    ALWAYS_INLINE Vec at(int64_t column, int64_t count) const {
      Vec bias = zero();
      if (own)
        bias = load_strided(own + column * own_stride, own_stride, count - column);
      else if (single)
        bias = load_strided(single + column * single_stride, single_stride, count - column);
      return of_distance ? add(bias, load_strided(of_distance + column, 1, count - column)) : bias;
    }
  };
  Biases biases(int64_t b, int64_t h, int64_t query, int64_t key) const {
    Biases row;
    if (scores.bias.data) {
      row.own = scores.bias.at(b, h, query) + key * scores.bias.key_stride;
      row.own_stride = scores.bias.key_stride;
    } else if (scores.float_bias.data) {
      row.single = scores.float_bias.at(b, h, query) + key * scores.float_bias.key_stride;
      row.single_stride = scores.float_bias.key_stride;
    }
    if (scores.distance_bias.data) row.of_distance = scores.distance_bias.at(b, h, query) + key;
    return row;
  }

  // The tanh of a soft cap; and the exponent of a score, for 2.
  ALWAYS_INLINE Vec capped(Vec product) const {
    return hyperbolic_tangent(mul(product, broadcast(scores.scale / scores.softcap)));
  }
  ALWAYS_INLINE Vec exponent(Vec product, Vec tanh_of_it, Vec bias) const {
    const Vec x = scores.softcap != 0 ? mul(tanh_of_it, broadcast(scores.softcap))
                                      : mul(product, broadcast(scores.scale));
    return mul(add(x, bias), broadcast(LOG2_E));
  }
};

// What a row ends with, from its largest exponent and the sum of its powers: its lse, and what its sum of values is
// multiplied by. A sink is one more logit.
struct RowEnd {
  float lse, factor;

  static RowEnd of(float exponent, float total, const float* sink) {
    float factor = 1;
    if (sink) {
      const float of_sink = *sink * LOG2_E, larger = std::max(exponent, of_sink);
      if (larger > MINUS_INFINITY) {
        factor = std::exp2(exponent - larger);
        total = total * factor + std::exp2(of_sink - larger);
        exponent = larger;
      }
    }
    if (total == 0) return {MINUS_INFINITY, 0};
    return {(exponent + std::log2(total)) * LN_2, factor / total};
  }
};

// A block of keys in up to three parts, of which the middle one is seen whole by every query of a strip.
struct Parts {
  Span keys, whole;

  // Calls body(part, is_whole) for the parts that hold any keys.
  template <class Body>
  ALWAYS_INLINE void each(Body&& body) const {
    if (keys.begin < whole.begin) body(Span{keys.begin, whole.begin}, false);
    if (whole.size()) body(whole, true);
    if (whole.end < keys.end) body(Span{whole.end, keys.end}, false);
  }
  // Says for each query of a head, KEY_BLOCK bytes apart, which keys of the other parts it sees; returns
  // whether any sees a key.
  bool look(const Sight& sight, int64_t head, Span queries, uint8_t* visible) const {
    bool any = whole.size();
    each([&](Span part, bool is_whole) {
      if (is_whole) return;
      for (int64_t query = queries.begin; query < queries.end; ++query)
        any |= sight.look(head, query, part,
                          visible + (query - queries.begin) * KEY_BLOCK + part.begin - keys.begin);
    });
    return any;
  }
};

// The columns of a buffer of scores that so many keys are given: whole vectors, in tile registers whole panels.
template <class T>
int64_t columns_of(int64_t keys) {
  constexpr int64_t together = IN_TILES<T> ? PANEL : LANES;
  return round_up(keys, together);
}

// The keep-mask of dropout: word j % 4 of Philox at counter (j / 4, i, b * H + h).
class Dropout {
 public:
  static constexpr int64_t BYTES = KEY_BLOCK + 4 * PHILOX_BATCH;  // of a row's mask

  Dropout(double p, uint64_t seed) : p_(p), key_(PhiloxKey::of(seed)) {
    threshold_ = uint32_t(std::min(__builtin_nearbyint(p * 4294967296.0), 4294967295.0));
  }
  bool drops() const { return p_ > 0; }
  float rescale() const { return float(1 / (1 - p_)); }

  // Writes 1 for kept keys of a row and 0 for others; keys.begin is a multiple of 4.
  void keep(int64_t head_of_all, int64_t query, Span keys, uint8_t* kept) const {
    philox_at_least(threshold_, key_, uint32_t(keys.begin / 4), uint32_t(query), uint32_t(head_of_all),
                    keys.size(), kept);
  }

 private:
  double p_;
  PhiloxKey key_;
  uint32_t threshold_;
};

}  // namespace pyarch

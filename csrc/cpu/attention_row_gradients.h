// What attention's backward does to a row of products; see attention_backward.cpp.
//
//   p = 2^(x - lse),  ds = p (dp - delta)
//
// either in one step, with a delta that is known, or in two, between which delta is summed over the row.
#pragma once

#include <algorithm>

#include "attention_probabilities.h"

namespace pyarch {

// a b; nothing where a is, whatever b is.
ALWAYS_INLINE Vec product_or_zero(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(a, zero(), _CMP_NEQ_UQ), a, b);
#else
  return _mm256_and_ps(mul(a, b), _mm256_cmp_ps(a, zero(), _CMP_NEQ_UQ));
#endif
}

// Where a thread keeps a strip's scores (KEY_PITCH a row), a chunk's, and what is known of each query.
struct RowBuffers {
  float *scores, *probability_grads, *slopes, *strip_score_grads;  // a strip's
  float *probabilities, *score_grads;                              // the chunk's
  const float *exponents, *deltas;                                 // the head's
  float* kept;
};

template <class T>
class RowGradients {
  static constexpr int64_t E = Step<T>::ELEMENTS;

 public:
  explicit RowGradients(const AttentionBackward<T>& args)
      : scores_(args.scores),
        bias_grad_(args.bias_grad),
        first_bias_grad_(args.first_bias_grad),
        heads_(args.shape.heads),
        rule_{args.scores},
        dropout_(args.scores.dropout, args.scores.seed) {}

  // Where a row's scores begin: which row of the strip's buffers, where in it, and where in the chunk's.
  struct Place {
    int64_t strip_row, strip_column, chunk_row, chunk_column;
  };

  // A query before keys, of which it sees those that a byte each says; null: all.
  struct Row {
    int64_t query;
    Span keys;
    Place place;
    const uint8_t* visible;
  };
  // Where the row adds to gradients of biases, or null.
  struct Gradients {
    float *bias, *distance;
  };
  // Over a row: of p, and of p dp.
  struct WeightedSums {
    Vec weights = zero(), gradients = zero();
  };
  // A vector of a row: p, what dropout leaves of it, dp, and the slope of the soft cap.
  struct Weighed {
    Vec probability, dropped, grad, slope;
  };

  // Calls body(k, weighed) for the vectors of a row.
  template <class Body>
  ALWAYS_INLINE void weigh(const RowBuffers& own, int64_t batch, int64_t head, const Row& row,
                           Body&& body) const {
    const auto [query, keys, place, visible] = row;
    const float* const scores = own.scores + first_of(row);
    const float* const grads = own.probability_grads + first_of(row);
    const bool plain = rule_.is_plain(), caps = scores_.softcap != 0, drops = dropout_.drops();
    uint8_t* const kept = reinterpret_cast<uint8_t*>(own.kept);
    if (drops) dropout_.keep(batch * heads_ + head, query, keys, kept);
    const auto biases = rule_.biases(batch, head, query, keys.begin);
    const Vec factor = broadcast(rule_.factor()), rescale = broadcast(dropout_.rescale());
    const Vec shift = sub(zero(), broadcast(own.exponents[query]));
    const int64_t columns = columns_of<T>(keys.size());
    for (int64_t k = 0; k < columns; k += LANES) {
      Vec x = load(scores + k), slope = zero();
      if (plain) {
        x = fma(x, factor, shift);
      } else {
        Vec tanh_of_it = zero();
        if (caps) tanh_of_it = rule_.capped(x);
        slope = fma(negative(tanh_of_it), tanh_of_it, broadcast(1.0f));
        x = add(rule_.exponent(x, tanh_of_it, biases.at(k, keys.size())), shift);
      }
      Vec p = power_of_two(x), grad = load(grads + k);
      if (visible) p = where(visible + k, p, zero());
      Vec dropped = p;
      if (drops) {
        grad = where(kept + k, mul(grad, rescale), zero());
        dropped = where(kept + k, mul(p, rescale), zero());
      }
      if (visible) {
        grad = where(visible + k, grad, zero());
        slope = where(visible + k, slope, zero());
      }
      body(k, Weighed{p, dropped, grad, slope});
    }
  }

  // Where a row's results go, in registers: stores of vectors may change what memory holds.
  struct Results {
    float *probabilities, *score_grads;
    bfloat16* strip_score_grads;
    bool second;  // of a pair of rows
    int64_t count;
    Gradients gradients;
    bool caps;
  };
  Results results_of(const RowBuffers& own, const Row& row, const Gradients& gradients) const {
    const Place& place = row.place;
    const int64_t first = place.chunk_row / E * KEY_PITCH + place.chunk_column;
    auto* const strip = reinterpret_cast<bfloat16*>(own.strip_score_grads + place.strip_row * KEY_PITCH);
    return {own.probabilities + first, own.score_grads + first, strip + place.strip_column,
            place.chunk_row % E != 0,  row.keys.size(),         gradients,
            scores_.softcap != 0};
  }

  // From a row's products its probabilities and the gradient of its scores.
  ALWAYS_INLINE void differentiate_row(const RowBuffers& own, int64_t batch, int64_t head, const Row& row,
                                       const Gradients& gradients) const {
    const Results results = results_of(own, row, gradients);
    const Vec delta = broadcast(own.deltas[row.query]);
    weigh(own, batch, head, row, [&](int64_t k, const Weighed& weighed) INLINED {
      store_across(results.probabilities + k, results.second, weighed.dropped);
      keep_score_grad(results, k, product_or_zero(weighed.probability, sub(weighed.grad, delta)),
                      weighed.slope);
    });
  }

  // The same in steps: products become p and dp in their place, which sum to delta, and make the gradient.
  ALWAYS_INLINE void weigh_row(const RowBuffers& own, int64_t batch, int64_t head, const Row& row,
                               WeightedSums& sums) const {
    const Results results = results_of(own, row, {});
    float* const probabilities = own.scores + first_of(row);
    float* const grads = own.probability_grads + first_of(row);
    float* const slopes = own.slopes + first_of(row);
    WeightedSums ours = sums;
    weigh(own, batch, head, row, [&](int64_t k, const Weighed& weighed) INLINED {
      store_across(results.probabilities + k, results.second, weighed.dropped);
      store(probabilities + k, weighed.probability);
      store(grads + k, weighed.grad);
      if (results.caps) store(slopes + k, weighed.slope);
      ours.weights = add(ours.weights, weighed.probability);
      ours.gradients = fma(weighed.probability, weighed.grad, ours.gradients);
    });
    sums = ours;
  }
  // The mean, and the mean difference to it, which lacks the rounding of what all gradients have in common.
  float delta_of(const RowBuffers& own, const Row& row, const WeightedSums& sums) const {
    const float* const probabilities = own.scores + first_of(row);
    const float* const grads = own.probability_grads + first_of(row);
    const float weights = sum(sums.weights), products = sum(sums.gradients);
    if (scores_.sinks || weights == 0) return products + own.deltas[row.query];
    const float one_by = 1 / weights, mean = products * one_by;
    Vec rest = zero();
    for (int64_t k = 0; k < columns_of<T>(row.keys.size()); k += LANES)
      rest = fma(load(probabilities + k), sub(load(grads + k), broadcast(mean)), rest);
    return mean + sum(rest) * one_by + own.deltas[row.query];
  }
  void differentiate_weighed_row(const RowBuffers& own, const Row& row, float delta,
                                 const Gradients& gradients) const {
    const Results results = results_of(own, row, gradients);
    const float* const probabilities = own.scores + first_of(row);
    const float* const grads = own.probability_grads + first_of(row);
    const float* const slopes = own.slopes + first_of(row);
    for (int64_t k = 0; k < columns_of<T>(results.count); k += LANES)
      keep_score_grad(results, k,
                      product_or_zero(load(probabilities + k), sub(load(grads + k), broadcast(delta))),
                      results.caps ? load(slopes + k) : zero());
  }

  // The same for pairs of rows that see all keys, where that is faster: from the first on, of `count` rows which
  // row_of(r) describes. They return how many rows they have done.
  template <class RowOf>
  int64_t differentiate_pairs(const RowBuffers& own, int64_t count, RowOf&& row_of) const {
    return each_pair(own, count, row_of, [&](int64_t r, const auto& pair) {
      const Vec deltas[2] = {broadcast(own.deltas[row_of(r).query]),
                             broadcast(own.deltas[row_of(r + 1).query])};
      for (int64_t k = 0; k < pair.columns; k += LANES) {
        const Vec p = pair.probability(0, k), q = pair.probability(1, k);
        pair.keep_probabilities(k, p, q);
        pair.keep_score_grads(k, pair.score_grad(0, k, p, deltas[0]), pair.score_grad(1, k, q, deltas[1]));
      }
    });
  }
  template <class RowOf>
  int64_t weigh_pairs(const RowBuffers& own, int64_t count, RowOf&& row_of, WeightedSums* sums) const {
    return each_pair(own, count, row_of, [&](int64_t r, const auto& pair) {
      WeightedSums ours[2] = {sums[r], sums[r + 1]};
      for (int64_t k = 0; k < pair.columns; k += LANES) {
        const Vec made[2] = {pair.probability(0, k), pair.probability(1, k)};
        pair.keep_probabilities(k, made[0], made[1]);
        unrolled<2>([&](auto i) INLINED {
          store(pair.scores + i * KEY_PITCH + k, made[i]);
          ours[i].weights = add(ours[i].weights, made[i]);
          ours[i].gradients = fma(made[i], pair.grad(i, k), ours[i].gradients);
        });
      }
      std::copy_n(ours, 2, sums + r);
    });
  }
  template <class RowOf>
  int64_t differentiate_weighed_pairs(const RowBuffers& own, int64_t count, RowOf&& row_of,
                                      const float* deltas) const {
    return each_pair(own, count, row_of, [&](int64_t r, const auto& pair) {
      const Vec delta[2] = {broadcast(deltas[r]), broadcast(deltas[r + 1])};
      for (int64_t k = 0; k < pair.columns; k += LANES)
        pair.keep_score_grads(k, pair.score_grad(0, k, pair.score(0, k), delta[0]),
                              pair.score_grad(1, k, pair.score(1, k), delta[1]));
    });
  }

  static int64_t first_of(const Row& row) { return row.place.strip_row * KEY_PITCH + row.place.strip_column; }

  ALWAYS_INLINE void keep_score_grad(const Results& results, int64_t k, Vec score_grad, Vec slope) const {
    if (results.gradients.bias) add_to_bias(results.gradients.bias, k, results.count, score_grad);
    if (float* const distance = results.gradients.distance) {
      const Mask mask = first_lanes(std::max<int64_t>(0, results.count - k));
      store(distance + k, add(load(distance + k, mask), score_grad), mask);
    }
    if (results.caps) score_grad = product_or_zero(slope, score_grad);
    store_across(results.score_grads + k, results.second, score_grad);
    if constexpr (E > 1) store(results.strip_score_grads + k, score_grad);
  }

  // A vector of a chunk's buffer, or one half of a vector of pairs of rows, of which the first comes first.
  static ALWAYS_INLINE void store_across(float* at, [[maybe_unused]] bool second, Vec value) {
#if defined(__AVX512BF16__)
    if constexpr (E > 1) {
      const __m512i half = _mm512_cvtepu16_epi32(narrow_bfloat16(value));
      const __m512i pair =
          second ? _mm512_or_si512(_mm512_castps_si512(load(at)), _mm512_slli_epi32(half, 16)) : half;
      store(at, _mm512_castsi512_ps(pair));
      return;
    }
#endif
    store(at, value);
  }

  void add_to_bias(float* grads, int64_t k, int64_t count, Vec score_grad) const {
    if (bias_grad_.key_stride == 0) {
      *grads += sum(score_grad);
    } else {
      const Mask mask = first_lanes(std::max<int64_t>(0, count - k));
      store(grads + k, first_bias_grad_ ? score_grad : add(load(grads + k, mask), score_grad), mask);
    }
  }

 private:
#if defined(__AMX_BF16__)

  // Two rows that are the halves of a step in the chunk's buffers; nothing stands between products, probabilities and
  // gradients.
  struct RowPair {
    float* scores;
    const float* probability_grads;
    Results results;
    Vec factor, shifts[2];
    int64_t columns;

    ALWAYS_INLINE Vec score(int i, int64_t k) const { return load(scores + i * KEY_PITCH + k); }
    ALWAYS_INLINE Vec grad(int i, int64_t k) const { return load(probability_grads + i * KEY_PITCH + k); }
    ALWAYS_INLINE Vec probability(int i, int64_t k) const {
      return flushed_power_of_two(fma(score(i, k), factor, shifts[i]));
    }
    ALWAYS_INLINE Vec score_grad(int i, int64_t k, Vec probability, Vec delta) const {
      return product_or_zero(probability, sub(grad(i, k), delta));
    }
    ALWAYS_INLINE void keep_probabilities(int64_t k, Vec first, Vec second) const {
      _mm512_storeu_si512(results.probabilities + k, zipped(narrow_both(first, second)));
    }
    ALWAYS_INLINE void keep_score_grads(int64_t k, Vec first, Vec second) const {
      const __m512i rows = narrow_both(first, second);
      _mm512_storeu_si512(results.score_grads + k, zipped(rows));
      bfloat16* const strip = results.strip_score_grads + k;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(strip), _mm512_castsi512_si256(rows));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(strip + 2 * KEY_PITCH),
                          _mm512_extracti64x4_epi64(rows, 1));
    }

    // Element i of the lower half, then of the upper one.
    static ALWAYS_INLINE __m512i zipped(__m512i halves) {
      const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i both =
          _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(LANES)), 16));
      return _mm512_permutexvar_epi16(both, halves);
    }
  };

  template <class RowOf, class Body>
  int64_t each_pair(const RowBuffers& own, int64_t count, RowOf&& row_of, Body&& body) const {
    if (!IN_TILES<T> || !rule_.is_plain() || dropout_.drops() || bias_grad_.data) return 0;
    for (int64_t r = 0; r + 2 <= count; r += 2) {
      const Row first = row_of(r);
      const auto shift = [&](int64_t query) { return sub(zero(), broadcast(own.exponents[query])); };
      body(r, RowPair{own.scores + first_of(first),
                      own.probability_grads + first_of(first),
                      results_of(own, first, {}),
                      broadcast(rule_.factor()),
                      {shift(first.query), shift(first.query + 1)},
                      columns_of<T>(first.keys.size())});
    }
    return count / 2 * 2;
  }

#else

  template <class RowOf, class Body>
  int64_t each_pair(const RowBuffers&, int64_t, RowOf&&, Body&&) const {
    return 0;
  }

#endif

  const AttentionScores<T>& scores_;
  const PerScore<float>& bias_grad_;
  const bool first_bias_grad_;
  const int64_t heads_;
  const ScoreRule<T> rule_;
  const Dropout dropout_;
};

}  // namespace pyarch

// Few taps along the width alone, on rows read where they are; see conv_strip.h.
#include <algorithm>
#include <type_traits>

#include "conv_strip.h"

namespace pyarch {
namespace {

// Calls visit(column, lanes, inside) for vectors from columns.begin on, the first of `head` lanes; inside ones are whole and
// read no padding.
template <class Visit>
ALWAYS_INLINE void sweep_columns(const Line& line, Span columns, int64_t head, Visit&& visit) {
  const int64_t last =
      std::min(columns.end, line.sources + line.before - (line.taps - 1) * line.dilation) - LANES;
  int64_t column = columns.begin, lanes = std::min(head, columns.size());
  while (column < columns.end) {
    if (lanes == LANES && column >= line.before)
      for (; column <= last; column += LANES) visit(column, int64_t(LANES), std::true_type{});
    lanes = std::min(lanes, columns.end - column);
    if (lanes > 0) visit(column, lanes, std::false_type{});
    column += lanes;
    lanes = LANES;
  }
}

// Lanes of a load at `place` that are real and in use.
inline Between real_lanes(const Line& line, int64_t place, int64_t lanes) {
  return lanes_between(
      {std::clamp<int64_t>(-place, 0, lanes), std::clamp<int64_t>(line.sources - place, 0, lanes)});
}

template <int K, bool STREAMS, class T>
__attribute__((noinline)) void correlate(const Line& line, Span columns, const T* source,
                                         const float* weights, float bias, T* out) {
  Vec held[K];
  unrolled<K>([&](auto k) {
    held[k] = broadcast(weights[k]);
    IN_REGISTER(held[k]);
  });
  const Vec start = broadcast(bias);
  const int64_t gap = line.dilation,
                misplaced = reinterpret_cast<uintptr_t>(out + columns.begin) / sizeof(T) % LANES;
  sweep_columns(line, columns, STREAMS ? LANES - misplaced : LANES,
                [&](int64_t column, int64_t lanes, auto inside) INLINED {
                  const int64_t place = column - line.before;
                  Vec sum = start;
                  unrolled<K>([&](auto k) INLINED {
                    const T* const p = source + place + k * gap;
                    if constexpr (inside)
                      sum = fma(held[k], load(p), sum);
                    else
                      sum = fma(held[k], load(p, real_lanes(line, place + k * gap, lanes)), sum);
                  });
                  if constexpr (!inside)
                    store(out + column, sum, first_lanes(lanes));
                  else if constexpr (STREAMS)
                    stream(out + column, sum);
                  else
                    store(out + column, sum);
                });
}

// Two sums a tap, in turn: one would wait for itself.
template <int K, class T>
__attribute__((noinline)) void reduce(const Line& line, Span columns, const T* source, const T* grad_out,
                                      float* to) {
  Vec even[K + 1], odd[K + 1];
  unrolled<K + 1>([&](auto k) { even[k] = odd[k] = zero(); });
  const int64_t gap = line.dilation;
  sweep_columns(line, columns, LANES, [&](int64_t column, int64_t lanes, auto inside) INLINED {
    const int64_t place = column - line.before;
    Vec grad;
    if constexpr (inside)
      grad = load(grad_out + column);
    else
      grad = load(grad_out + column, first_lanes(lanes));
    IN_REGISTER(grad);
    unrolled<K>([&](auto k) INLINED {
      const T* const p = source + place + k * gap;
      Vec value;
      if constexpr (inside)
        value = load(p);
      else
        value = load(p, real_lanes(line, place + k * gap, lanes));
      const Vec sum = fma(grad, value, even[k]);
      even[k] = odd[k], odd[k] = sum;
    });
    const Vec sum = add(grad, even[K]);
    even[K] = odd[K], odd[K] = sum;
  });
  unrolled<K + 1>([&](auto k) { store(to + k * LANES, add(load(to + k * LANES), add(even[k], odd[k]))); });
}

template <class Visit>
void with_taps(int taps, Visit&& visit) {
  unrolled<3>([&](auto index) {
    if (taps == index + 2) visit(std::integral_constant<int, index + 2>{});
  });
}

}  // namespace

template <class T>
void correlate_line(const Line& line, Span columns, const T* source, const float* weights, float bias, T* out,
                    bool streams) {
  with_taps(line.taps, [&](auto K) {
    if constexpr (std::is_same_v<T, float>)
      if (streams) return correlate<K, true>(line, columns, source, weights, bias, out);
    correlate<K, false>(line, columns, source, weights, bias, out);
  });
}

template <class T>
void reduce_line(const Line& line, Span columns, const T* source, const T* grad_out, float* sums) {
  with_taps(line.taps, [&](auto K) { reduce<K>(line, columns, source, grad_out, sums); });
}

#define INSTANTIATE(T)                                                                      \
  template void correlate_line(const Line&, Span, const T*, const float*, float, T*, bool); \
  template void reduce_line(const Line&, Span, const T*, const T*, float*);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch

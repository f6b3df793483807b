// The micro-kernels of conv_strip.h.
#include "conv_strip.h"

#include <algorithm>

#include "integers.h"

namespace pyarch {
namespace {

// A row's loads: one a tap, or, to split two vectors into even and odd columns, two for every two taps.
constexpr int loads_of(int taps, int stride) { return stride == 1 ? taps : (taps + 1) / 2 * 2; }
constexpr int64_t load_offset(int load, int stride, int64_t tap_step) {
  return stride == 1 ? load * tap_step : load / 2 * 2 + load % 2 * LANES;
}

// Taps [FIRST, FIRST + K) of a row; all of them where the stride splits vectors.
template <int FIRST, int K, int S, bool INSIDE, class T>
ALWAYS_INLINE void load_taps(const T* row, int64_t tap_step, const Strip& strip, Vec (&taps)[K]) {
  const auto loaded = [&](auto i) INLINED {
    const T* const place = row + load_offset(i, S, tap_step);
    if constexpr (INSIDE)
      return load(place);
    else
      return load(place, strip.loads[i]);
  };
  unrolled<K>([&](auto k) INLINED {
    if constexpr (S == 1) {
      taps[k] = loaded(std::integral_constant<int, FIRST + k>{});
      IN_REGISTER(taps[k]);
    } else if constexpr (k % 2 == 0) {
      const Vec low = loaded(k), high = loaded(std::integral_constant<int, k + 1>{});
      taps[k] = even_elements(low, high);
      if constexpr (k + 1 < K) taps[k + 1] = odd_elements(low, high);
    }
  });
}

// How many targets one source row touches at most, and after how many source rows the registers' roles repeat.
constexpr int live(int taps, int stride) { return (taps + stride - 1) / stride; }
constexpr int cycle(int taps, int stride) { return live(taps, stride) * stride; }

// The register of the target whose tap `kh` reads source row `phase`; -1 where none does.
constexpr int slot(int phase, int kh, int taps, int stride) {
  const int shifted = phase - kh + cycle(taps, stride);
  return shifted % stride ? -1 : shifted / stride % live(taps, stride);
}

// Calls visit(phase, checked) for source rows 0, 1, 2 ... of a walk, a cycle at a time. Unchecked ones are real, and all
// targets that would read them exist.
template <int K, int S, class Visit>
ALWAYS_INLINE void walk_rows(const Walk& walk, Visit&& visit) {
  const int64_t rows = (walk.targets - 1) * S + K;
  const int64_t first = std::max<int64_t>(K - 1, walk.real.begin),
                last = std::min((walk.targets - 1) * S + 1, walk.real.end);
  for (int64_t row = 0; row < rows; row += cycle(K, S)) {
    if (row >= first && row + cycle(K, S) <= last)
      unrolled<cycle(K, S)>([&](auto phase) INLINED { visit(phase, row + phase, std::false_type{}); });
    else
      unrolled<cycle(K, S)>([&](auto phase) INLINED {
        if (row + phase < rows) visit(phase, row + phase, std::true_type{});
      });
  }
}

template <int K, int S, bool INSIDE, class T>
__attribute__((noinline)) void correlate_strip(const Walk& walk, const Strip& strip, const T* source,
                                               const float* weights, float bias, T* out) {
  Vec held[K][K], sums[live(K, S)];
  unrolled<K * K>([&](auto i) {
    held[i / K][i % K] = broadcast(weights[i]);
    IN_REGISTER(held[i / K][i % K]);
  });
  unrolled<live(K, S)>([&](auto i) { sums[i] = zero(); });
  const Vec start = broadcast(bias);
  walk_rows<K, S>(walk, [&](auto phase, int64_t row, auto checked) INLINED {
    if constexpr (phase % S == 0) sums[slot(phase, 0, K, S)] = start;
    if (!checked || (row >= walk.real.begin && row < walk.real.end)) {
      __builtin_prefetch(source + walk.fetch_source);
      Vec taps[K];
      load_taps<0, K, S, INSIDE>(source, walk.tap_step, strip, taps);
      unrolled<K * K>([&](auto i) INLINED {
        constexpr int to = slot(phase, i % K, K, S);
        if constexpr (to >= 0) sums[to] = fma(held[i % K][i / K], taps[i / K], sums[to]);
      });
    }
    source += walk.source_step;
    constexpr int done = slot(phase, K - 1, K, S);
    if constexpr (done >= 0) {
      if (!checked || row >= K - 1) {
        __builtin_prefetch(out + walk.fetch_target, 1);
        if (INSIDE || strip.all_lanes)
          store(out, sums[done]);
        else
          store(out, sums[done], strip.lanes);
        out += walk.target_step;
      }
    }
  });
}

// Columns [FIRST, FIRST + COUNT) of the taps. A strip's sums start at zero: adding strip by strip keeps float32's error
// near the square root of a running sum's.
template <int K, int S, int FIRST, int COUNT, bool INSIDE, class T>
__attribute__((noinline)) void reduce_strip(const Walk& walk, const Strip& strip, const T* source,
                                            const T* grad_out, float* to) {
  Vec sums[K][COUNT], grads[live(K, S)], total = zero();
  unrolled<K * COUNT>([&](auto i) { sums[i / COUNT][i % COUNT] = zero(); });
  unrolled<live(K, S)>([&](auto i) { grads[i] = zero(); });
  walk_rows<K, S>(walk, [&](auto phase, int64_t row, auto checked) INLINED {
    if constexpr (phase % S == 0) {
      if (!checked || row < walk.targets * S) {
        Vec grad;
        if constexpr (INSIDE)
          grad = load(grad_out);
        else
          grad = load(grad_out, strip.lanes);
        IN_REGISTER(grad);
        grads[slot(phase, 0, K, S)] = grad;
        if constexpr (FIRST == 0) total = add(total, grad);
        grad_out += walk.target_step;
      }
    }
    if (!checked || (row >= walk.real.begin && row < walk.real.end)) {
      if constexpr (FIRST == 0) __builtin_prefetch(source + walk.fetch_source);
      Vec taps[COUNT];
      load_taps<FIRST, COUNT, S, INSIDE>(source, walk.tap_step, strip, taps);
      unrolled<K>([&](auto kh) INLINED {
        constexpr int from = slot(phase, kh, K, S);
        if constexpr (from >= 0) {
          if (!checked || (row >= kh && row - kh <= (walk.targets - 1) * S))
            unrolled<COUNT>([&](auto kw) { sums[kh][kw] = fma(grads[from], taps[kw], sums[kh][kw]); });
        }
      });
    }
    source += walk.source_step;
  });
  unrolled<K * COUNT>([&](auto i) {
    float* const sum = to + (i / COUNT * K + FIRST + i % COUNT) * LANES;
    store(sum, add(load(sum), sums[i / COUNT][i % COUNT]));
  });
  if constexpr (FIRST == 0) store(to + K * K * LANES, add(load(to + K * K * LANES), total));
}

// Calls visit(taps, stride) with both as constants.
template <class Visit>
void with_kernel(int taps, int stride, Visit&& visit) {
  constexpr std::integral_constant<int, 3> three;
  if (stride == 2) return visit(three, std::integral_constant<int, 2>{});
  constexpr std::integral_constant<int, 1> every;
  if (taps == 3) return visit(three, every);
  if (taps == 5) return visit(std::integral_constant<int, 5>{}, every);
  visit(std::integral_constant<int, 7>{}, every);
}

}  // namespace

std::vector<Strip> StripPlan::strips(int64_t targets, bool exact) const {
  std::vector<Strip> strips;
  for (int64_t column = 0; column < targets; column += LANES) {
    const int64_t left = targets - column;
    Strip strip{};
    strip.column = !exact && left < LANES && targets >= LANES ? targets - LANES : column;
    const int64_t lanes = std::min<int64_t>(LANES, targets - strip.column);
    strip.lanes = first_lanes(lanes), strip.all_lanes = strip.inside = lanes == LANES;
    for (int i = 0; i < loads_of(taps, stride); ++i) {
      const int64_t offset = load_offset(i, stride, dilation),
                    first = strip.column * stride - before + offset;
      const int64_t used = stride == 1 ? lanes : lanes * stride - i % 2 * LANES;
      const Span real = {std::clamp<int64_t>(-first, 0, LANES),
                         std::clamp<int64_t>(std::min(sources - first, used), 0, LANES)};
      strip.loads[i] = lanes_between(real);
      strip.inside &= real.begin == 0 && real.end == LANES;
    }
    strips.push_back(strip);
  }
  return strips;
}

template <class T>
void correlate_strips(int taps, int stride, const Walk& walk, const std::vector<Strip>& strips,
                      const T* source, const float* weights, float bias, T* out) {
  with_kernel(taps, stride, [&](auto K, auto S) {
    for (const Strip& strip : strips)
      (strip.inside ? correlate_strip<K, S, true, T>
                    : correlate_strip<K, S, false, T>)(walk, strip, source + strip.column * S, weights, bias,
                                                       out + strip.column);
  });
}

template <class T>
void reduce_strips(int taps, int stride, const Walk& walk, const std::vector<Strip>& strips, const T* source,
                   const T* grad_out, float* sums) {
  with_kernel(taps, stride, [&](auto K, auto S) {
    for (const Strip& strip : strips) {
      const auto columns = [&](auto first, auto count) {
        (strip.inside ? reduce_strip<K, S, first, count, true, T>
                      : reduce_strip<K, S, first, count, false, T>)(walk, strip, source + strip.column * S,
                                                                    grad_out + strip.column, sums);
      };
      constexpr std::integral_constant<int, 0> from_first;
      if constexpr (K < 7) {
        columns(from_first, K);
      } else {
        // The sums of all taps would leave the registers.
        constexpr std::integral_constant<int, 2> two;
        columns(from_first, std::integral_constant<int, 3>{});
        columns(std::integral_constant<int, 3>{}, two);
        columns(std::integral_constant<int, 5>{}, two);
      }
    }
  });
}

#define INSTANTIATE(T)                                                                                     \
  template void correlate_strips(int, int, const Walk&, const std::vector<Strip>&, const T*, const float*, \
                                 float, T*);                                                               \
  template void reduce_strips(int, int, const Walk&, const std::vector<Strip>&, const T*, const T*, float*);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch

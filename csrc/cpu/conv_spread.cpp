// The input's gradient of a 3x3 kernel of stride 2; see conv_strip.h.
#include <algorithm>

#include "conv_strip.h"
#include "integers.h"

namespace pyarch {
namespace {

// Writes the columns of one row: `even` and `odd` ones in turn.
template <bool INSIDE, class T>
ALWAYS_INLINE void store_row(T* row, Vec even, Vec odd, const SpreadStrip& strip) {
  Vec low, high;
  interleave(even, odd, low, high);
  if constexpr (INSIDE) {
    store(row, low);
    store(row + LANES, high);
  } else {
    store(row, low, strip.stores[0]);
    store(row + LANES, high, strip.stores[1]);
  }
}

template <bool INSIDE, class T>
__attribute__((noinline)) void spread_strip(const SpreadPlan& plan, Span rows, const SpreadStrip& strip,
                                            const T* grad_out, const float* weights, T* grad_input) {
  Vec w[9];
  unrolled<9>([&](auto i) {
    w[i] = broadcast(weights[i]);
    IN_REGISTER(w[i]);
  });
  const int64_t sources = plan.sources[0], width = plan.sources[1], row = plan.targets[1];
  const int64_t first = floor_div(rows.begin + plan.before[0], 2),
                last = floor_div(rows.end - 1 + plan.before[0], 2);
  // Columns b and b - 1 of one row.
  const auto load_row = [&](int64_t pair, Vec& here, Vec& before) INLINED {
    here = before = zero();
    if (pair < 0 || pair >= sources) return;
    const T* const place = grad_out + pair * width + strip.pair;
    __builtin_prefetch(place + plan.next * sources * width);
    if constexpr (INSIDE) {
      here = load(place), before = load(place - 1);
    } else {
      here = load(place, strip.loads[0]), before = load(place - 1, strip.loads[1]);
    }
    IN_REGISTER(here);
    IN_REGISTER(before);
  };
  Vec above, above_before, here, before;
  load_row(first - 1, above, above_before);
  for (int64_t pair = first; pair <= last; ++pair) {
    load_row(pair, here, before);
    const int64_t target = 2 * pair - plan.before[0];
    T* const out = grad_input + target * row + 2 * strip.pair - plan.before[1];
    if (target >= rows.begin) {
      const Vec even = fma(w[8], above_before, fma(w[6], above, fma(w[2], before, mul(w[0], here))));
      store_row<INSIDE>(out, even, fma(w[7], above, mul(w[1], here)), strip);
    }
    if (target + 1 < rows.end)
      store_row<INSIDE>(out + row, fma(w[5], before, mul(w[3], here)), mul(w[4], here), strip);
    above = here, above_before = before;
  }
}

}  // namespace

std::vector<SpreadStrip> SpreadPlan::strips() const {
  const auto real = [](int64_t first, int64_t places) {
    return Span{std::clamp<int64_t>(-first, 0, LANES), std::clamp<int64_t>(places - first, 0, LANES)};
  };
  std::vector<SpreadStrip> strips;
  const int64_t last = floor_div(targets[1] - 1 + before[1], 2);
  for (int64_t pair = floor_div(before[1], 2); pair <= last; pair += LANES) {
    SpreadStrip strip{pair, true, {}, {}};
    for (int i = 0; i < 2; ++i) {
      const Span loaded = real(pair - i, sources[1]),
                 stored = real(2 * pair - before[1] + i * LANES, targets[1]);
      strip.loads[i] = lanes_between(loaded), strip.stores[i] = lanes_between(stored);
      strip.inside &= loaded.size() == LANES && stored.size() == LANES;
    }
    strips.push_back(strip);
  }
  return strips;
}

template <class T>
void spread_strips(const SpreadPlan& plan, Span rows, const std::vector<SpreadStrip>& strips,
                   const T* grad_out, const float* weights, T* grad_input) {
  for (const SpreadStrip& strip : strips)
    (strip.inside ? spread_strip<true, T> : spread_strip<false, T>)(plan, rows, strip, grad_out, weights,
                                                                    grad_input);
}

#define INSTANTIATE(T)                                                                            \
  template void spread_strips(const SpreadPlan&, Span, const std::vector<SpreadStrip>&, const T*, \
                              const float*, T*);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch

// Depthwise convolution of 1-D kernels on rows in (N, C, L) order, stride 1, no dilation, zero padding: LANES rows at a time
// are turned, so that lanes run over rows. A vector of sources then serves every tap from an aligned address; along a row
// it would serve every LANES-th only, from addresses that straddle cache lines.
//
//   correlate:  out[j]  = bias + sum_k weight[k] * source[j + k]        sums of LANES targets in registers
//   reduce:     sums[k] += sum_j grad_out[j] * source[j + k]            LANES grad_outputs in registers
//
// Squares of LANES places are turned just before a tile reads them, and a tile's targets are turned back in registers.
#include <algorithm>
#include <cstring>
#include <vector>

#include "conv_plan.h"
#include "conv_rows.h"
#include "conv_strip.h"
#include "integers.h"

namespace pyarch {
namespace {

constexpr int TAPS = LANES / 2;  // of a step: with LANES vectors they fit the registers
constexpr int64_t LEAST_TAPS = 5,
                  MOST_TAPS = 256;  // fewer are bound by memory, more would leave no room in a cache
constexpr int64_t STRETCH = 2048,
                  LEAST_STRETCH = 256;  // targets a task: its sources stay in a second-level cache
constexpr int64_t TASKS = 32;           // enough for threads to share
constexpr int64_t FETCHED_SQUARES = 4;  // how far ahead memory is fetched

// `count` neighbouring rows of `size` elements.
template <class T>
struct Rows {
  T* first;
  int64_t size, count;

  T* operator[](int64_t row) const { return first + row * size; }
};

// Places [place, place + LANES) of all rows as vectors; padding and rows out of use are zeros.
template <class RowAt>
ALWAYS_INLINE void turn_square(int64_t rows, RowAt&& row_at, int64_t place, int64_t size, float* to) {
  Vec square[LANES];
  if (rows == LANES && place >= 0 && place + LANES <= size) {
    unrolled<LANES>([&](auto i) { square[i] = load(row_at(i) + place); });
  } else {
    const Between real =
        lanes_between({std::clamp<int64_t>(-place, 0, LANES), std::clamp<int64_t>(size - place, 0, LANES)});
    unrolled<LANES>([&](auto i) { square[i] = i < rows ? load(row_at(i) + place, real) : zero(); });
  }
  transpose(square);
  unrolled<LANES>([&](auto i) { store(to + i * LANES, square[i]); });
}

// Rows turned as far as anyone asked; scratch of places from `begin` on.
template <class T>
struct Turned {
  Rows<const T> rows;
  int64_t begin;
  float* memory;
  int64_t end = begin;

  const float* at(int64_t place) const { return memory + (place - begin) * LANES; }
  void reach(int64_t place) {
    for (; end < place; end += LANES) {
      for (int64_t row = 0; row < rows.count; ++row)
        __builtin_prefetch(rows[row] + end + FETCHED_SQUARES * LANES);
      turn_square(
          rows.count, [&](int64_t row) { return rows[row]; }, end, rows.size, memory + (end - begin) * LANES);
    }
  }
};

// Squares begin at multiples of LANES, as rows do.
int64_t whole_square(int64_t place) { return floor_div(place, LANES) * LANES; }
int64_t turned_floats(int64_t places) { return round_up(places + LANES, LANES) * LANES; }

// Calls step(first tap, number of taps as a constant) for all taps.
template <class Step>
ALWAYS_INLINE void for_taps(int64_t taps, Step&& step) {
  int64_t tap = 0;
  for (; tap + TAPS <= taps; tap += TAPS) step(tap, std::integral_constant<int, TAPS>{});
  unrolled<TAPS - 1>([&](auto index) INLINED {
    if (taps - tap == index + 1) step(tap, std::integral_constant<int, index + 1>{});
  });
}

// LANES targets of all rows, of which the first `count` are written.
template <class T>
__attribute__((noinline)) void correlate_square(int64_t taps, const float* source, const float* weights,
                                                Vec start, const Rows<T>& out, int64_t place, int64_t count) {
  for (int64_t row = 0; row < out.count; ++row)
    __builtin_prefetch(out[row] + place + FETCHED_SQUARES * LANES, 1);
  Vec sums[LANES];
  unrolled<LANES>([&](auto r) { sums[r] = start; });
  for_taps(taps, [&](int64_t tap, auto step) INLINED {
    constexpr int K = step;
    Vec held[K];
    unrolled<K>([&](auto k) INLINED {
      held[k] = load(weights + (tap + k) * LANES);
      IN_REGISTER(held[k]);
    });
    const float* const first = source + tap * LANES;
    unrolled<LANES + K - 1>([&](auto at) INLINED {
      Vec value = load(first + at * LANES);
      IN_REGISTER(value);
      unrolled<K>([&](auto k) INLINED {
        if constexpr (at >= k && at - k < LANES) sums[at - k] = fma(held[k], value, sums[at - k]);
      });
    });
  });
  transpose(sums);
  if (out.count == LANES && count == LANES)
    unrolled<LANES>([&](auto i) { store(out[i] + place, sums[i]); });
  else
    unrolled<LANES>([&](auto i) {
      if (i < out.count) store(out[i] + place, sums[i], first_lanes(count));
    });
}

// `R` grad_outputs of all rows; `sums` has LANES floats a tap and LANES of grad_out's own sum.
template <int R>
__attribute__((noinline)) void reduce_square(int64_t taps, const float* source, const float* grad_out,
                                             float* sums) {
  Vec grad[R], total = zero();
  unrolled<R>([&](auto r) INLINED {
    grad[r] = load(grad_out + r * LANES);
    IN_REGISTER(grad[r]);
    total = add(total, grad[r]);
  });
  store(sums + taps * LANES, add(load(sums + taps * LANES), total));
  if (!source) return;
  for_taps(taps, [&](int64_t tap, auto step) INLINED {
    constexpr int K = step;
    Vec tap_sums[K];
    unrolled<K>([&](auto k) { tap_sums[k] = zero(); });
    const float* const first = source + tap * LANES;
    unrolled<R + K - 1>([&](auto at) INLINED {
      Vec value = load(first + at * LANES);
      IN_REGISTER(value);
      unrolled<K>([&](auto k) INLINED {
        if constexpr (at >= k && at - k < R) tap_sums[k] = fma(grad[at - k], value, tap_sums[k]);
      });
    });
    unrolled<K>([&](auto k) {
      float* const to = sums + (tap + k) * LANES;
      store(to, add(load(to), tap_sums[k]));
    });
  });
}

// How rows are shared out: groups of at most LANES, each cut into stretches along the row.
struct Cut {
  int64_t rows, groups, stretches, length;

  explicit Cut(const ConvShape& shape) : rows(shape.batch * shape.channels), groups(ceil_div(rows, LANES)) {
    const int64_t longest = std::max(shape.in[2], shape.out[2]);
    const int64_t wanted = std::clamp(ceil_div(TASKS, groups), int64_t(1), ceil_div(longest, LEAST_STRETCH));
    length = round_up(ceil_div(longest, std::max(wanted, ceil_div(longest, STRETCH))), LANES);
    stretches = ceil_div(longest, length);
  }

  int64_t first_row(int64_t group) const { return rows * group / groups; }
  template <class T>
  Rows<T> rows_of(T* image, int64_t group, int64_t size) const {
    const int64_t first = first_row(group);
    return {image + first * size, size, first_row(group + 1) - first};
  }
  Span stretch(int64_t index, int64_t size) const {
    return {std::min(index * length, size), std::min((index + 1) * length, size)};
  }
};

// The kernels of a group's rows, one a lane, from the first tap or from the last.
template <class T>
void turn_weights(const ConvShape& shape, const Cut& cut, int64_t group, const T* weight, bool backward,
                  float* to) {
  const int64_t taps = shape.kernel[2], first = cut.first_row(group);
  float* const turned = scratch(Slot::wide, turned_floats(taps));
  for (int64_t tap = 0; tap < taps; tap += LANES)
    turn_square(
        cut.first_row(group + 1) - first,
        [&](int64_t row) { return weight + (first + row) % shape.channels * taps; }, tap, taps,
        turned + tap * LANES);
  for (int64_t tap = 0; tap < taps; ++tap)
    store(to + tap * LANES, load(turned + (backward ? taps - 1 - tap : tap) * LANES));
}

// Targets from `place` on that read sources from `before` places earlier on. The last ones come with neighbours already
// done.
template <class T>
void correlate_block(int64_t taps, int64_t before, Span targets, int64_t place, Turned<T>& source,
                     const float* weights, Vec start, const Rows<T>& out) {
  const int64_t first = std::clamp<int64_t>(targets.end - LANES, targets.begin, place);
  source.reach(first - before + LANES + taps - 1);
  correlate_square(taps, source.at(first - before), weights, start, out, first,
                   std::min<int64_t>(LANES, targets.end - first));
}

}  // namespace

bool turns_rows(const ConvShape& shape) {
  const auto is_flat = [&](int dimension) {
    return shape.in[dimension] == 1 && shape.kernel[dimension] == 1 && shape.out[dimension] == 1 &&
           shape.before[dimension] == 0;
  };
  const int64_t rows = shape.batch * shape.channels;
  return shape.mode == PaddingMode::zeros && shape.multiplier == 1 && is_flat(0) && is_flat(1) &&
         shape.stride[2] == 1 && shape.dilation[2] == 1 && shape.kernel[2] >= LEAST_TAPS &&
         shape.kernel[2] <= MOST_TAPS && shape.before[2] < shape.kernel[2] &&
         std::min(shape.in[2], shape.out[2]) >= LANES && 4 * rows >= 3 * round_up(rows, LANES);
}

template <class T>
void forward_turned(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel) {
  const Cut cut(shape);
  const int64_t taps = shape.kernel[2], before = shape.before[2];
  parallel(cut.groups * cut.stretches, [&](int64_t begin, int64_t end) {
    float* const weights = scratch(Slot::weights, turned_floats(taps));
    float* const memory = scratch(Slot::source, turned_floats(cut.length + 2 * LANES + taps));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / cut.stretches;
      const Rows<T> output = cut.rows_of(args.output, group, shape.out[2]);
      turn_weights(shape, cut, group, args.weight, false, weights);
      alignas(64) float start[LANES] = {};
      for (int64_t lane = 0; args.bias && lane < output.count; ++lane)
        start[lane] = to_float(args.bias[(cut.first_row(group) + lane) % shape.channels]);
      const Span targets = cut.stretch(task % cut.stretches, shape.out[2]);
      Turned<T> source{cut.rows_of(args.input, group, shape.in[2]), whole_square(targets.begin - before),
                       memory};
      for (int64_t place = targets.begin; place < targets.end; place += LANES)
        correlate_block(taps, before, targets, place, source, weights, load(start), output);
    }
  });
}

template <class T>
void backward_turned(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel) {
  const Cut cut(shape);
  const int64_t taps = shape.kernel[2], before = shape.before[2], after = taps - 1 - before, row = taps + 1;
  const bool wants_sums = args.grad_weight || args.grad_bias;
  std::vector<float> partial(wants_sums ? cut.stretches * cut.rows * row : 0);
  parallel(cut.groups * cut.stretches, [&](int64_t begin, int64_t end) {
    float* const weights = scratch(Slot::weights, turned_floats(taps));
    float* const sums = scratch(Slot::sums, turned_floats(row));
    const int64_t floats = turned_floats(cut.length + 2 * LANES + 2 * taps);
    float *const grad_memory = scratch(Slot::grad, floats), *const memory = scratch(Slot::source, floats);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / cut.stretches, stretch = task % cut.stretches;
      const Span inputs = cut.stretch(stretch, shape.in[2]), outputs = cut.stretch(stretch, shape.out[2]);
      const int64_t first = std::min(inputs.begin, outputs.begin);
      Turned<T> grad{cut.rows_of(args.grad_output, group, shape.out[2]), whole_square(first - after),
                     grad_memory};
      Turned<T> source{cut.rows_of(args.input, group, shape.in[2]), whole_square(outputs.begin - before),
                       memory};
      const Rows<T> grad_input = cut.rows_of(args.grad_input, group, shape.in[2]);
      if (args.grad_input) turn_weights(shape, cut, group, args.weight, true, weights);
      std::memset(sums, 0, row * LANES * sizeof(float));
      for (int64_t place = 0; place < cut.length; place += LANES) {
        const int64_t in = inputs.begin + place, out = outputs.begin + place;
        if (args.grad_input && in < inputs.end)
          correlate_block(taps, after, inputs, in, grad, weights, zero(), grad_input);
        if (!wants_sums || out >= outputs.end) continue;
        grad.reach(out + LANES);
        if (args.grad_weight) source.reach(out - before + LANES + taps - 1);
        const float* const read = args.grad_weight ? source.at(out - before) : nullptr;
        if (out + LANES <= outputs.end) {
          reduce_square<LANES>(taps, read, grad.at(out), sums);
        } else {
          // Sources that no output reads are left out: a NaN there would survive its zero gradient.
          for (int64_t i = 0; out + i < outputs.end; ++i)
            reduce_square<1>(taps, read ? read + i * LANES : nullptr, grad.at(out + i), sums);
        }
      }
      float* const to = partial.data() + (stretch * cut.rows + cut.first_row(group)) * row;
      for (int64_t lane = 0; wants_sums && lane < grad.rows.count; ++lane)
        for (int64_t i = 0; i < row; ++i) to[lane * row + i] = sums[i * LANES + lane];
    }
  });

  if (!wants_sums) return;
  for (int64_t i = shape.channels; i < cut.stretches * cut.rows; ++i) {
    float* const total = partial.data() + i % shape.channels * row;
    for (int64_t tap = 0; tap < row; ++tap) total[tap] += partial[i * row + tap];
  }
  for (int64_t channel = 0; channel < shape.channels; ++channel) {
    const float* const total = partial.data() + channel * row;
    for (int64_t i = 0; args.grad_weight && i < taps; ++i)
      from_float(total[i], args.grad_weight[channel * taps + i]);
    if (args.grad_bias) from_float(total[taps], args.grad_bias[channel]);
  }
}

#define INSTANTIATE(T)                                                                       \
  template void forward_turned(const ConvShape&, const ForwardArgs<T>&, const ParallelFor&); \
  template void backward_turned(const ConvShape&, const BackwardArgs<T>&, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch

// Small depthwise kernels on planes in (N, C, H, W) order with zero padding, reading the planes themselves: square ones in
// strips of columns that walk down a plane, few taps along the width alone in one sweep of a row; see conv_strip.h. A
// task is a band of one plane. Backward takes the input's gradient, then the weight's, from a band that is in the cache.
#include "conv_rows.h"

#include <algorithm>
#include <vector>

#include "conv_plan.h"
#include "conv_strip.h"

namespace pyarch {
namespace {

constexpr int64_t MOST_TAPS = LARGEST_KERNEL * LARGEST_KERNEL;
// Bands: their targets and sources stay in a first-level cache, their ends, shared with neighbours, are a small part.
constexpr int64_t BAND_BYTES = 16 * 1024, LEAST_ROWS = 14, LEAST_COLUMNS = 512;
constexpr int64_t TASKS = 32;  // enough for threads to share
// Larger targets leave the caches before anyone reads them.
constexpr int64_t STREAMED_BYTES = 24 * 1024 * 1024;

// One direction: targets of one plane read sources of one plane.
struct Planes {
  int taps, stride;                                        // of each of height and width
  int64_t sources[2], targets[2], before[2], dilation[2];  // height, width
  int64_t next;                                            // how many planes on the next one lies

  std::vector<Strip> strips(bool exact) const {
    return StripPlan{taps, stride, dilation[1], before[1], sources[1]}.strips(targets[1], exact);
  }

  // Calls visit(walk, offset of its first source, offset of its first target) for the rows of a band: neighbours that
  // share source rows lie `dilation` apart.
  template <class Visit>
  void walks(Span rows, Visit&& visit) const {
    const int64_t step = dilation[0];
    for (int64_t residue = 0; residue < std::min(step, rows.size()); ++residue) {
      const int64_t target = rows.begin + residue, source = target * stride - before[0];
      const Span real = {std::max<int64_t>(ceil_div(-source, step), 0), ceil_div(sources[0] - source, step)};
      visit(Walk{ceil_div(rows.size() - residue, step), real, step * sources[1], step * targets[1],
                 dilation[1], next * sources[0] * sources[1], next * targets[0] * targets[1]},
            source * sources[1] - before[1], target * targets[1]);
    }
  }
};

Planes outputs_of(const ConvShape& shape, int64_t next) {
  return {int(shape.kernel[1]),
          int(shape.stride[1]),
          {shape.in[1], shape.in[2]},
          {shape.out[1], shape.out[2]},
          {shape.before[1], shape.before[2]},
          {shape.dilation[1], shape.dilation[2]},
          next};
}

// At stride 1 the inputs' gradients are a convolution of grad_output with the turned kernel.
Planes inputs_of(const ConvShape& shape, int64_t next) {
  return {int(shape.kernel[1]),
          1,
          {shape.out[1], shape.out[2]},
          {shape.in[1], shape.in[2]},
          {(shape.kernel[1] - 1) * shape.dilation[1] - shape.before[1],
           (shape.kernel[2] - 1) * shape.dilation[2] - shape.before[2]},
          {shape.dilation[1], shape.dilation[2]},
          next};
}

SpreadPlan pairs_of(const ConvShape& shape, int64_t next) {
  return {{shape.before[1], shape.before[2]}, {shape.out[1], shape.out[2]}, {shape.in[1], shape.in[2]}, next};
}

// Planes are cut along H, rows without height along W.
int64_t band_count(const ConvShape& shape, int64_t size, int64_t row, int64_t least) {
  const int64_t bytes = size * row * int64_t(sizeof(float));
  const int64_t wanted = std::max(ceil_div(bytes, BAND_BYTES), ceil_div(TASKS, shape.batch * shape.channels));
  return std::clamp(wanted, int64_t(1), std::max(size / least, int64_t(1)));
}

Span band_of(int64_t size, int64_t index, int64_t bands) {
  return {size * index / bands, size * (index + 1) / bands};
}

template <class T>
void unpack(const T* weight, int64_t taps, bool turned, float* to) {
  for (int64_t i = 0; i < taps; ++i) to[i] = to_float(weight[turned ? taps - 1 - i : i]);
}

// Calls correlate(input plane, output plane, band, weights, bias) for every band of every plane.
template <class T, class Correlate>
void forward_bands(const ConvShape& shape, const ForwardArgs<T>& args, int64_t bands,
                   const ParallelFor& parallel, Correlate&& correlate) {
  parallel(shape.batch * shape.channels * bands, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands, channel = plane % shape.channels;
      float weights[MOST_TAPS];
      unpack(args.weight + channel * shape.taps(), shape.taps(), false, weights);
      correlate(args.input + plane * shape.in_size(), args.output + plane * shape.out_size(), task % bands,
                weights, args.bias ? to_float(args.bias[channel]) : 0.0f);
    }
  });
}

// Calls spread(grad_output plane, grad_input plane, band, weights) and reduce(grad_output plane, input plane, band, sums)
// for every band of every plane, with LANES sums a tap and LANES of grad_output itself.
template <class T, class Spread, class Reduce>
void backward_bands(const ConvShape& shape, const BackwardArgs<T>& args, int64_t bands, bool turned,
                    const ParallelFor& parallel, Spread&& spread, Reduce&& reduce) {
  const int64_t taps = shape.taps(), row = taps + 1;
  const bool wants_sums = args.grad_weight || args.grad_bias;
  // Each channel's bands are summed in order, in as many stretches as give threads work; the number of stretches
  // depends on the shape alone, so the sums are the same from run to run.
  const int64_t units = shape.batch * bands, stretches = std::min(units, ceil_div(TASKS, shape.channels));
  std::vector<float> partial(wants_sums ? stretches * shape.channels * row : 0);
  parallel(shape.channels * stretches, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task / stretches, stretch = task % stretches;
      float weights[MOST_TAPS];
      unpack(args.weight + channel * taps, taps, turned, weights);
      alignas(64) float sums[(MOST_TAPS + 1) * LANES] = {};
      for (int64_t unit = units * stretch / stretches; unit < units * (stretch + 1) / stretches; ++unit) {
        const int64_t plane = unit / bands * shape.channels + channel;
        const T* const grad_output = args.grad_output + plane * shape.out_size();
        if (args.grad_input)
          spread(grad_output, args.grad_input + plane * shape.in_size(), unit % bands, weights);
        if (wants_sums) reduce(grad_output, args.input + plane * shape.in_size(), unit % bands, sums);
      }
      float* const to = partial.data() + (stretch * shape.channels + channel) * row;
      for (int64_t i = 0; wants_sums && i < row; ++i) to[i] = sum(load(sums + i * LANES));
    }
  });

  for (int64_t channel = 0; wants_sums && channel < shape.channels; ++channel) {
    float* const total = partial.data() + channel * row;
    for (int64_t stretch = 1; stretch < stretches; ++stretch)
      for (int64_t i = 0; i < row; ++i) total[i] += partial[(stretch * shape.channels + channel) * row + i];
    for (int64_t i = 0; args.grad_weight && i < taps; ++i)
      from_float(total[i], args.grad_weight[channel * taps + i]);
    if (args.grad_bias) from_float(total[taps], args.grad_bias[channel]);
  }
}

template <class T>
void forward_planes(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel) {
  const Planes planes = outputs_of(shape, 1);
  const std::vector<Strip> strips = planes.strips(false);
  const int64_t bands = band_count(shape, shape.out[1], shape.out[2], LEAST_ROWS);
  forward_bands(shape, args, bands, parallel,
                [&](const T* input, T* output, int64_t band, const float* weights, float bias) {
                  planes.walks(band_of(shape.out[1], band, bands),
                               [&](const Walk& walk, int64_t source, int64_t target) {
                                 correlate_strips(planes.taps, planes.stride, walk, strips, input + source,
                                                  weights, bias, output + target);
                               });
                });
}

template <class T>
void backward_planes(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel) {
  const bool spreads = shape.stride[1] == 2;
  const int64_t next = shape.batch > 1 ? shape.channels : 1;  // a channel's images follow one another
  const Planes inputs = inputs_of(shape, next), outputs = outputs_of(shape, next);
  const SpreadPlan pairs = pairs_of(shape, next);
  const std::vector<Strip> input_strips = inputs.strips(false), output_strips = outputs.strips(true);
  const std::vector<SpreadStrip> pair_strips = pairs.strips();
  const int64_t bands = band_count(shape, std::min(shape.in[1], shape.out[1]), shape.in[2], LEAST_ROWS);
  backward_bands(
      shape, args, bands, !spreads, parallel,
      [&](const T* grad_output, T* grad_input, int64_t band, const float* weights) {
        const Span rows = band_of(shape.in[1], band, bands);
        if (spreads) return spread_strips(pairs, rows, pair_strips, grad_output, weights, grad_input);
        inputs.walks(rows, [&](const Walk& walk, int64_t source, int64_t target) {
          correlate_strips(inputs.taps, 1, walk, input_strips, grad_output + source, weights, 0.0f,
                           grad_input + target);
        });
      },
      [&](const T* grad_output, const T* input, int64_t band, float* sums) {
        outputs.walks(band_of(shape.out[1], band, bands),
                      [&](const Walk& walk, int64_t source, int64_t target) {
                        reduce_strips(outputs.taps, outputs.stride, walk, output_strips, input + source,
                                      grad_output + target, sums);
                      });
      });
}

bool is_streamed(const ConvShape& shape, int64_t targets, int64_t element_size) {
  return shape.batch * shape.channels * targets * element_size > STREAMED_BYTES;
}

Line output_line(const ConvShape& shape) {
  return {int(shape.kernel[2]), shape.in[2], shape.before[2], shape.dilation[2]};
}
Line input_line(const ConvShape& shape) {
  const int64_t reach = (shape.kernel[2] - 1) * shape.dilation[2];
  return {int(shape.kernel[2]), shape.out[2], reach - shape.before[2], shape.dilation[2]};
}

template <class T>
void forward_lines(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel) {
  const Line line = output_line(shape);
  const int64_t bands = band_count(shape, shape.out[2], 1, LEAST_COLUMNS);
  const bool streams = is_streamed(shape, shape.out_size(), sizeof(T));
  forward_bands(shape, args, bands, parallel,
                [&](const T* input, T* output, int64_t band, const float* weights, float bias) {
                  correlate_line(line, band_of(shape.out[2], band, bands), input, weights, bias, output,
                                 streams);
                });
}

template <class T>
void backward_lines(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel) {
  const Line outputs = output_line(shape), inputs = input_line(shape);
  const int64_t bands = band_count(shape, std::min(shape.in[2], shape.out[2]), 1, LEAST_COLUMNS);
  const bool streams = is_streamed(shape, shape.in_size(), sizeof(T));
  backward_bands(
      shape, args, bands, true, parallel,
      [&](const T* grad_output, T* grad_input, int64_t band, const float* weights) {
        correlate_line(inputs, band_of(shape.in[2], band, bands), grad_output, weights, 0.0f, grad_input,
                       streams);
      },
      [&](const T* grad_output, const T* input, int64_t band, float* sums) {
        reduce_line(outputs, band_of(shape.out[2], band, bands), input, grad_output, sums);
      });
}

bool is_flat(const ConvShape& shape, int dimension) {
  return shape.in[dimension] == 1 && shape.kernel[dimension] == 1 && shape.out[dimension] == 1 &&
         shape.before[dimension] == 0;
}

bool is_line(const ConvShape& shape) {
  return is_flat(shape, 1) && has_line_kernel(shape.kernel[2]) && shape.stride[2] == 1;
}

bool is_small_plane(const ConvShape& shape) {
  const auto both = [](const int64_t (&each)[3], int64_t value) {
    return each[1] == value && each[2] == value;
  };
  if (both(shape.stride, 2)) return both(shape.kernel, 3) && both(shape.dilation, 1);
  const bool known = both(shape.kernel, 3) || both(shape.kernel, 5) || both(shape.kernel, 7);
  return both(shape.stride, 1) && known;
}

}  // namespace

bool reads_rows_in_place(const ConvShape& shape) {
  return shape.mode == PaddingMode::zeros && shape.multiplier == 1 && is_flat(shape, 0) &&
         (is_line(shape) || is_small_plane(shape));
}

template <class T>
void forward_rows_in_place(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel) {
  is_line(shape) ? forward_lines(shape, args, parallel) : forward_planes(shape, args, parallel);
}

template <class T>
void backward_rows_in_place(const ConvShape& shape, const BackwardArgs<T>& args,
                            const ParallelFor& parallel) {
  is_line(shape) ? backward_lines(shape, args, parallel) : backward_planes(shape, args, parallel);
}

#define INSTANTIATE(T)                                                                              \
  template void forward_rows_in_place(const ConvShape&, const ForwardArgs<T>&, const ParallelFor&); \
  template void backward_rows_in_place(const ConvShape&, const BackwardArgs<T>&, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch

// Depthwise convolution on planes in (N, C, D, H, W) order: a task is one plane, lanes run along W.
//
// A box of a plane is copied once to float scratch, padding and 16-bit widening done on the way and rows split by the
// stride's phases, so that every tap of every tile is one vector load at a fixed offset. Backward loads a box of input
// and one of grad_output and takes all gradients from the two.
#include "conv_rows.h"

#include <cstring>

#include "conv_sweep.h"

namespace pyarch {
namespace {

// A box of places as floats: rows `row` apart, each of `phases` parts `phase` apart, holding every phases-th place. Rows
// of one phase begin `lead` floats in, so that place 0, which is where memory is copied from, begins a vector.
struct Layout {
  Span box[3];
  int64_t phases, lead, phase, row, plane, floats;

  Layout(const Box& places, int64_t phases) : box{places[0], places[1], places[2]}, phases(phases) {
    const int64_t before = box[2].begin % LANES;
    lead = phases > 1 ? 0 : before < 0 ? LANES + before : before;
    phase = round_up(lead + ceil_div(box[2].size(), phases), LANES) + (phases > 1 ? LANES : 0);
    row = phases * phase;
    plane = box[1].size() * row;
    floats = round_up(box[0].size() * plane + 2 * LANES, LANES);
  }

  int64_t at_row(int64_t depth, int64_t height) const {
    return (depth - box[0].begin) * plane + (height - box[1].begin) * row + lead;
  }
};

// Fetches, besides, what lies `ahead` elements on: the same places of the plane that this thread loads next. Writes whole
// vectors, zeros beyond `count`.
template <class T>
ALWAYS_INLINE void widen(const T* from, float* to, int64_t count, int64_t ahead) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    __builtin_prefetch(from + i + ahead);
    store(to + i, load(from + i));
  }
  if (i < count) store(to + i, load(from + i, first_lanes(count - i)));
}

template <class T>
void narrow(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  if (i < count) store(to + i, load(from + i, first_lanes(count - i)), first_lanes(count - i));
}

void split_phases(const float* line, float* to, int64_t count, const Layout& layout) {
  if (layout.phases == 2) {
    for (int64_t i = 0; i < count; i += 2 * LANES)
      deinterleave(line + i, to + i / 2, to + layout.phase + i / 2);
    return;
  }
  for (int64_t i = 0; i < count; ++i) to[i % layout.phases * layout.phase + i / layout.phases] = line[i];
}

void join_phases(const float* from, float* line, int64_t count, const Layout& layout) {
  if (layout.phases == 2) {
    for (int64_t i = 0; i < count; i += 2 * LANES) {
      Vec low, high;
      interleave(load(from + i / 2), load(from + layout.phase + i / 2), low, high);
      store(line + i, low);
      store(line + i + LANES, high);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) line[i] = from[i % layout.phases * layout.phase + i / layout.phases];
}

ALWAYS_INLINE void zero_fill(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) store(to + i, zero());
}

// Rows are loaded in ascending order and may write up to LANES floats beyond their end, which the next one covers.
template <class T>
void load_plane(const T* plane, const int64_t (&size)[3], PaddingMode mode, const Layout& layout, float* to) {
  const Span places = layout.box[2];
  const int64_t ahead = size[0] * size[1] * size[2];
  const int64_t begin = std::clamp<int64_t>(0, places.begin, places.end);
  const int64_t end = std::clamp<int64_t>(size[2], begin, places.end);
  const int64_t left = begin - places.begin, inner = end - begin, right = places.end - end;
  float* const line = layout.phases > 1 ? scratch(Slot::line, places.size() + 3 * LANES) : nullptr;
  for (int64_t depth = layout.box[0].begin; depth < layout.box[0].end; ++depth) {
    const int64_t d = source_place(depth, size[0], mode);
    for (int64_t height = layout.box[1].begin; height < layout.box[1].end; ++height, to += layout.row) {
      const int64_t h = source_place(height, size[1], mode);
      if (d < 0 || h < 0) {
        zero_fill(to, layout.row);
        continue;
      }
      const T* const row = plane + (d * size[1] + h) * size[2];
      float* const out = line ? line : to + layout.lead;
      zero_fill(out, left);
      widen(row + begin, out + left, inner, ahead);
      zero_fill(out + left + inner, right);
      if (mode != PaddingMode::zeros) {
        for (int64_t i = 0; i < left; ++i)
          out[i] = to_float(row[source_place(places.begin + i, size[2], mode)]);
        for (int64_t i = left + inner; i < places.size(); ++i)
          out[i] = to_float(row[source_place(places.begin + i, size[2], mode)]);
      }
      if (line) split_phases(line, to, places.size(), layout);
    }
  }
}

// Bands run along H unless there are too few rows to share loads between.
bool prefers_line(const ConvShape& shape) { return shape.out[1] < 4 || shape.kernel[1] == 1; }

Taps lane_taps(const Axis& axis, const Layout& layout) {
  Taps taps = axis.taps;
  for (Tap& tap : taps) tap.at = floor_div(tap.at, layout.phases) + (tap.at % layout.phases) * layout.phase;
  return taps;
}

// Tables over sources laid out by `layout`; `groups` planes of them when several outputs share an input channel.
TapTables rows_tables(const ConvShape& shape, const Axis (&axes)[3], const Layout& layout, bool line,
                      int64_t groups) {
  std::vector<int64_t> group;
  for (int64_t g = 0; g < groups; ++g) group.push_back(g * layout.floats);
  const Taps depth = scaled(axes[0].taps, layout.plane), width = lane_taps(axes[2], layout);
  if (line)
    return tap_tables(group, depth, scaled(axes[1].taps, layout.row), width, NO_TAPS, LANES, 1, shape.taps(),
                      true);
  return tap_tables(group, depth, NO_TAPS, axes[1].taps, width, axes[1].spacing, layout.row, shape.taps());
}

int64_t source_offset(const Axis (&axes)[3], const Layout& layout, const TilePlace& tile) {
  return layout.at_row(axes[0].first_source(tile.depth), axes[1].first_source(tile.height)) +
         (axes[2].first_source(tile.width) - layout.box[2].begin) / layout.phases;
}

template <class T>
void pack_weights(const TapTables& tables, const T* weight, float* packed) {
  for (int64_t i = 0; i < tables.packed(); ++i) packed[i] = to_float(weight[tables.order[i]]);
}

// Outputs larger than this leave the caches before anyone reads them: lines of floats are written past the caches.
constexpr int64_t STREAMED_BYTES = 24 * 1024 * 1024;

// Runs tiles into rows of T, `out_step` elements apart, and fetches the memory that the same tiles of the next plane,
// `ahead` elements on, will write.
template <class T>
void correlate_into(const TapTables& tables, const TilePlace& place, const float* source,
                    const float* weights, const float* bias, T* out, int64_t out_step, int64_t ahead,
                    bool streams) {
  streams = streams && std::is_same_v<T, float> && place.all_lanes && out_step == LANES &&
            reinterpret_cast<uintptr_t>(out) % sizeof(Vec) == 0;
  correlate_scalar_weights(place.band, tables, place.range,
                           {source,
                            weights,
                            bias,
                            out,
                            ELEMENT<T>,
                            out_step,
                            streams ? 0 : ahead,
                            place.lanes,
                            place.all_lanes,
                            {place.run, place.run_step, 0, 0, place.run_step},
                            streams});
}

// What forward and the weight gradient need to know of one box of outputs.
struct OutputPart {
  Box outputs;
  Layout sources;
  TapTables tables;
};

struct OutputPlan {
  Axis axes[3];
  bool line;
  std::vector<OutputPart> parts;

  OutputPlan(const ConvShape& shape, const int64_t (&parts_of)[3])
      : axes{forward_axis(shape, 0), forward_axis(shape, 1), forward_axis(shape, 2)},
        line(prefers_line(shape)) {
    for (int64_t i = 0; i < parts_of[0] * parts_of[1] * parts_of[2]; ++i) {
      const Box outputs = part_of(shape.out, parts_of, i);
      const Layout sources(sources_of(axes, outputs), shape.stride[2]);
      parts.push_back({outputs, sources, rows_tables(shape, axes, sources, line, 1)});
    }
  }
};

// One residue of the stride in every dimension: the input places that the same taps reach.
struct GradientPhase {
  int64_t of[3];
  Axis axes[3];
  TapTables tables;
};

// What the input gradient of one box of input places needs to know.
struct InputPart {
  Box inputs;    // with padding where a padding mode folds it back
  Layout grads;  // of all grad_outputs that this part and the outputs beside it read
  std::vector<GradientPhase> phases;
};

struct InputPlan {
  bool line, folds;
  std::vector<InputPart> parts;

  InputPlan(const ConvShape& shape, const OutputPlan& outputs, const int64_t (&parts_of)[3], bool wanted)
      : line(shape.in[1] / shape.stride[1] < 4 || shape.kernel[1] == 1),
        folds(shape.mode != PaddingMode::zeros) {
    for (size_t i = 0; i < outputs.parts.size(); ++i) {
      Box inputs = part_of(shape.in, parts_of, int64_t(i)), grads = outputs.parts[i].outputs;
      for (int dimension = 0; wanted && dimension < 3; ++dimension) {
        if (folds) inputs[dimension] = padded_places(shape, dimension);
        grads[dimension] = grads[dimension].united(gradient_sources(shape, dimension, inputs[dimension]));
      }
      parts.push_back({inputs, Layout(grads, 1), {}});
      if (wanted) add_phases(shape, parts.back());
    }
  }

 private:
  void add_phases(const ConvShape& shape, InputPart& part) const {
    for (int64_t d = 0; d < shape.stride[0]; ++d)
      for (int64_t h = 0; h < shape.stride[1]; ++h)
        for (int64_t w = 0; w < shape.stride[2]; ++w) {
          GradientPhase phase{
              {d, h, w},
              {gradient_axis(shape, 0, d), gradient_axis(shape, 1, h), gradient_axis(shape, 2, w)},
              {}};
          phase.tables = rows_tables(shape, phase.axes, part.grads, line, shape.multiplier);
          part.phases.push_back(std::move(phase));
        }
  }
};

// Writes one phase's places to rows of `layout`, `row` elements apart.
template <class To>
void gradient_phase(const ConvShape& shape, const InputPart& part, const GradientPhase& phase, bool line,
                    const float* grad, const float* weights, To* to, const Layout& layout, int64_t row,
                    bool streams) {
  Box targets;
  for (int i = 0; i < 3; ++i) targets[i] = gradient_targets(shape, i, phase.of[i], part.inputs[i]);
  const int64_t plane = layout.box[1].size() * row;
  const int64_t band_step = line ? LANES : phase.axes[1].period * shape.stride[1] * row;
  sweep_rows(phase.axes, targets, line, layout.phases > 1, [&](const TilePlace& tile) {
    const int64_t d = gradient_place(shape, 0, phase.of[0], tile.depth) - layout.box[0].begin;
    const int64_t h = gradient_place(shape, 1, phase.of[1], tile.height) - layout.box[1].begin;
    const int64_t w = gradient_place(shape, 2, phase.of[2], tile.width) - layout.box[2].begin;
    To* const out = to + d * plane + h * row + w % layout.phases * layout.phase + w / layout.phases;
    const float* const source = grad + source_offset(phase.axes, part.grads, tile);
    correlate_into(phase.tables, tile, source, weights, nullptr, out, band_step,
                   layout.phases > 1 ? 0 : shape.in_size(), streams);
  });
}

template <class T>
void join_rows(const ConvShape& shape, const float* sums, const Layout& wide, T* to) {
  const Span width = wide.box[2];
  float* const line = scratch(Slot::line, width.size() + 2 * LANES);
  for (int64_t d = wide.box[0].begin; d < wide.box[0].end; ++d)
    for (int64_t h = wide.box[1].begin; h < wide.box[1].end; ++h) {
      join_phases(sums + wide.at_row(d, h), line, width.size(), wide);
      narrow(line, to + (d * shape.in[1] + h) * shape.in[2] + width.begin, width.size());
    }
}

// Adds every padded place's gradient to the place it was read from.
template <class T>
void fold_rows(const ConvShape& shape, const float* sums, const Layout& wide, T* to) {
  const Span width = wide.box[2];
  float* const line = scratch(Slot::line, width.size() + 2 * LANES);
  float* const folded = scratch(Slot::folded, shape.in_size());
  std::memset(folded, 0, shape.in_size() * sizeof(float));
  for (int64_t depth = wide.box[0].begin; depth < wide.box[0].end; ++depth)
    for (int64_t height = wide.box[1].begin; height < wide.box[1].end; ++height) {
      join_phases(sums + wide.at_row(depth, height), line, width.size(), wide);
      const int64_t d = source_place(depth, shape.in[0], shape.mode);
      const int64_t h = source_place(height, shape.in[1], shape.mode);
      float* const row = folded + (d * shape.in[1] + h) * shape.in[2];
      for (int64_t w = 0; w < width.size(); ++w)
        row[source_place(width.begin + w, shape.in[2], shape.mode)] += line[w];
    }
  narrow(folded, to, shape.in_size());
}

// The input gradient of one part of one plane, from grad_outputs in scratch.
template <class T>
void input_gradient(const ConvShape& shape, const InputPlan& plan, const InputPart& part, const T* weight,
                    const float* grad, T* to) {
  const bool direct = shape.stride[2] == 1 && !plan.folds;
  const bool streams = shape.batch * shape.channels * shape.in_size() * int64_t(sizeof(T)) > STREAMED_BYTES;
  const Layout rows(box_of(shape.in), 1), wide(part.inputs, shape.stride[2]);
  float* const sums = direct ? nullptr : scratch(Slot::wide, wide.floats + LANES);
  for (const GradientPhase& phase : part.phases) {
    float* const weights = scratch(Slot::weights, phase.tables.packed());
    pack_weights(phase.tables, weight, weights);
    if (direct)
      gradient_phase(shape, part, phase, plan.line, grad, weights, to, rows, shape.in[2], streams);
    else
      gradient_phase(shape, part, phase, plan.line, grad, weights, sums + wide.lead, wide, wide.row, false);
  }
  if (plan.folds)
    fold_rows(shape, sums, wide, to);
  else if (!direct)
    join_rows(shape, sums, wide, to);
}

}  // namespace

template <class T>
void conv_forward_rows(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel) {
  if (reads_rows_in_place(shape)) return forward_rows_in_place(shape, args, parallel);
  if (turns_rows(shape)) return forward_turned(shape, args, parallel);
  int64_t parts_of[3];
  choose_parts(shape, 1, parts_of);
  const OutputPlan plan(shape, parts_of);
  const int64_t parts = int64_t(plan.parts.size());
  const int64_t band_step = plan.line ? LANES : plan.axes[1].period * shape.out[2];
  const bool streams =
      shape.batch * shape.output_channels() * shape.out_size() * int64_t(sizeof(T)) > STREAMED_BYTES;

  parallel(shape.batch * shape.channels * parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / parts, channel = plane % shape.channels;
      const OutputPart& part = plan.parts[task % parts];
      float* const source = scratch(Slot::source, part.sources.floats);
      float* const weights = scratch(Slot::weights, part.tables.packed());
      load_plane(args.input + plane * shape.in_size(), shape.in, shape.mode, part.sources, source);
      for (int64_t j = 0; j < shape.multiplier; ++j) {
        const int64_t o = channel * shape.multiplier + j;
        pack_weights(part.tables, args.weight + o * shape.taps(), weights);
        const float bias = args.bias ? to_float(args.bias[o]) : 0.0f;
        T* const output = args.output + (plane * shape.multiplier + j) * shape.out_size();
        sweep_rows(plan.axes, part.outputs, plan.line, false, [&](const TilePlace& tile) {
          const int64_t at = (tile.depth * shape.out[1] + tile.height) * shape.out[2] + tile.width;
          const float* const first = source + source_offset(plan.axes, part.sources, tile);
          correlate_into(part.tables, tile, first, weights, &bias, output + at, band_step, shape.out_size(),
                         streams);
        });
      }
    }
  });
}

template <class T>
void conv_backward_rows(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel) {
  if (reads_rows_in_place(shape)) return backward_rows_in_place(shape, args, parallel);
  if (turns_rows(shape)) return backward_turned(shape, args, parallel);
  int64_t parts_of[3] = {1, 1, 1};
  if (shape.mode == PaddingMode::zeros) choose_parts(shape, 2 + shape.multiplier, parts_of);
  const OutputPlan plan(shape, parts_of);
  const InputPlan input_plan(shape, plan, parts_of, args.grad_input != nullptr);
  const bool sums_weights = args.grad_weight || args.grad_bias;

  // Each channel's images are summed in order, in as many stretches as give threads work; the number of stretches
  // depends on the shape alone, so the sums are the same from run to run.
  const int64_t parts = int64_t(plan.parts.size()), units = shape.batch * parts;
  const int64_t stretches = std::min(units, ceil_div(32, shape.channels));
  const std::vector<int64_t>& order = plan.parts[0].tables.order;
  const int64_t packed = int64_t(order.size()), row = shape.taps() + 1, kernels = shape.output_channels();
  std::vector<float> partial(sums_weights ? stretches * kernels * row : 0);

  parallel(shape.channels * stretches, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task / stretches, stretch = task % stretches;
      const int64_t sums_a_kernel = (packed + 1) * LANES;
      float* const sums = scratch(Slot::sums, sums_a_kernel * shape.multiplier);
      std::memset(sums, 0, sums_a_kernel * shape.multiplier * sizeof(float));
      for (int64_t unit = units * stretch / stretches; unit < units * (stretch + 1) / stretches; ++unit) {
        const int64_t plane = unit / parts * shape.channels + channel;
        const OutputPart& part = plan.parts[unit % parts];
        const InputPart& input_part = input_plan.parts[unit % parts];
        const Layout& grads = input_part.grads;
        float* const grad = scratch(Slot::grad, grads.floats * shape.multiplier);
        for (int64_t j = 0; j < shape.multiplier; ++j)
          load_plane(args.grad_output + (plane * shape.multiplier + j) * shape.out_size(), shape.out,
                     PaddingMode::zeros, grads, grad + j * grads.floats);
        if (args.grad_input)
          input_gradient(shape, input_plan, input_part,
                         args.weight + channel * shape.multiplier * shape.taps(), grad,
                         args.grad_input + plane * shape.in_size());
        if (!sums_weights) continue;

        float* const source = args.grad_weight ? scratch(Slot::source, part.sources.floats) : nullptr;
        if (source)
          load_plane(args.input + plane * shape.in_size(), shape.in, shape.mode, part.sources, source);
        const int64_t grad_step = plan.line ? LANES : plan.axes[1].period * grads.row;
        for (int64_t j = 0; j < shape.multiplier; ++j) {
          float* const kernel_sums = sums + j * sums_a_kernel;
          sweep_rows(plan.axes, part.outputs, plan.line, true, [&](const TilePlace& tile) {
            const int64_t at = grads.at_row(tile.depth, tile.height) + tile.width - grads.box[2].begin;
            const int64_t from = source ? source_offset(plan.axes, part.sources, tile) : 0;
            reduce(tile.band, part.tables, tile.range,
                   {source + from,
                    grad + j * grads.floats + at,
                    grad_step,
                    source ? kernel_sums : nullptr,
                    kernel_sums + packed * LANES,
                    tile.lanes,
                    tile.all_lanes,
                    {tile.run, tile.run_step, 0, 0, tile.run_step}});
          });
        }
      }
      for (int64_t j = 0; sums_weights && j < shape.multiplier; ++j) {
        float* const to = partial.data() + (stretch * kernels + channel * shape.multiplier + j) * row;
        const float* const from = sums + j * sums_a_kernel;
        for (int64_t i = 0; i < packed; ++i) to[order[i]] = sum(load(from + i * LANES));
        to[shape.taps()] = sum(load(from + packed * LANES));
      }
    }
  });

  if (!sums_weights) return;
  for (int64_t stretch = 1; stretch < stretches; ++stretch)
    for (int64_t i = 0; i < kernels * row; ++i) partial[i] += partial[stretch * kernels * row + i];
  for (int64_t o = 0; o < kernels; ++o) {
    if (args.grad_weight) narrow(partial.data() + o * row, args.grad_weight + o * shape.taps(), shape.taps());
    if (args.grad_bias) narrow(partial.data() + o * row + shape.taps(), args.grad_bias + o, 1);
  }
}

#define INSTANTIATE(T)                                                                          \
  template void conv_forward_rows(const ConvShape&, const ForwardArgs<T>&, const ParallelFor&); \
  template void conv_backward_rows(const ConvShape&, const BackwardArgs<T>&, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch

// Depthwise convolution on images in (N, D, H, W, C) order: lanes run along C, bands along W.
//
// A task is a box of one image and a block of neighbouring groups of LANES channels. Each group of the box is copied to
// float scratch of its own, padding and 16-bit widening done on the way, so that a place is one aligned vector and its
// neighbours follow it. With a depth multiplier m, output channel c * m + j is computed for one j at a time; its lanes
// lie m apart in memory.
#include <cstring>

#include "conv_channels.h"
#include "conv_sweep.h"

namespace pyarch {
namespace {

constexpr int64_t GROUPS_TOGETHER = 4;  // neighbours in memory, as many as leave room in the cache

// A box of places of one group: LANES floats a place.
struct Layout {
  Span box[3];
  int64_t row, plane, floats;

  explicit Layout(const Box& places) : box{places[0], places[1], places[2]} {
    row = box[2].size() * LANES;
    plane = box[1].size() * row;
    floats = std::max<int64_t>(box[0].size() * plane, 0);
  }

  int64_t at(int64_t depth, int64_t height, int64_t width) const {
    return (depth - box[0].begin) * plane + (height - box[1].begin) * row + (width - box[2].begin) * LANES;
  }
};

// Loads a box of several groups; group g's floats begin at to + g * step, and its lanes are lanes_of(g).
template <class T, class LanesOf>
void load_box(const T* image, const int64_t (&size)[3], int64_t groups, LanesOf&& lanes_of, PaddingMode mode,
              const Layout& layout, float* to, int64_t step) {
  const Span width = layout.box[2];
  const int64_t begin = std::clamp<int64_t>(0, width.begin, width.end);
  const int64_t end = std::clamp<int64_t>(size[2], begin, width.end);
  for (int64_t depth = layout.box[0].begin; depth < layout.box[0].end; ++depth) {
    const int64_t d = source_place(depth, size[0], mode);
    for (int64_t height = layout.box[1].begin; height < layout.box[1].end; ++height, to += layout.row) {
      const int64_t h = source_place(height, size[1], mode);
      for (int64_t group = 0; group < groups; ++group) {
        float* const line = to + group * step;
        if (d < 0 || h < 0) {
          std::memset(line, 0, layout.row * sizeof(float));
          continue;
        }
        const Lanes lanes = lanes_of(group);
        const T* const row = image + (d * size[1] + h) * size[2] * lanes.channels + lanes.first;
        const auto pad = [&](int64_t from, int64_t until) {
          for (int64_t w = from; w < until; ++w) {
            const int64_t source = source_place(w, size[2], mode);
            store(line + (w - width.begin) * LANES,
                  source < 0 ? zero() : load_place(row + source * lanes.channels, lanes));
          }
        };
        pad(width.begin, begin);
        const int64_t next_row = size[2] * lanes.channels;
        for (int64_t w = begin; w < end; ++w) {
          const T* const place = row + w * lanes.channels;
          __builtin_prefetch(place + next_row);
          store(line + (w - width.begin) * LANES, load_place(place, lanes));
        }
        pad(end, width.end);
      }
    }
  }
}

TapTables channels_tables(const ConvShape& shape, const Axis (&axes)[3], const Layout& layout,
                          int64_t groups) {
  std::vector<int64_t> group;
  for (int64_t g = 0; g < groups; ++g) group.push_back(g * layout.floats);
  return tap_tables(group, scaled(axes[0].taps, layout.plane), scaled(axes[1].taps, layout.row), axes[2].taps,
                    NO_TAPS, axes[2].spacing, LANES, shape.taps());
}

int64_t source_offset(const Axis (&axes)[3], const Layout& layout, const TilePlace& tile) {
  return layout.at(axes[0].first_source(tile.depth), axes[1].first_source(tile.height),
                   axes[2].first_source(tile.width));
}

// Runs one tile into places of an image, `out_step` elements apart, fetching the memory that the same tile of the next
// row, `next_row` elements on, will write. Lanes that lie apart in memory pass through a block of floats.
template <class T>
void correlate_into(const TapTables& tables, const TilePlace& place, const float* source,
                    const float* weights, const float* bias, const Lanes& lanes, T* out, int64_t out_step,
                    int64_t next_row) {
  CorrelateTile<> tile{
      source, weights, bias, out, ELEMENT<T>, out_step, next_row, lanes.mask(), lanes.count == LANES, {}};
  if (lanes.step == 1) return correlate_vector_weights(place.band, tables, place.range, tile);
  alignas(64) float block[BAND * LANES];
  tile.out = block, tile.element = Element::float32, tile.out_step = LANES, tile.all_lanes = true,
  tile.fetch_out = 0;
  correlate_vector_weights(place.band, tables, place.range, tile);
  for (int r = 0; r < place.band; ++r) store_place(out + r * out_step, load(block + r * LANES), lanes);
}

struct OutputPart {
  Box outputs;
  Layout sources;
  TapTables tables;
};

struct OutputPlan {
  Axis axes[3];
  std::vector<OutputPart> parts;

  OutputPlan(const ConvShape& shape, const int64_t (&parts_of)[3])
      : axes{forward_axis(shape, 0), forward_axis(shape, 1), forward_axis(shape, 2)} {
    for (int64_t i = 0; i < parts_of[0] * parts_of[1] * parts_of[2]; ++i) {
      const Box outputs = part_of(shape.out, parts_of, i);
      const Layout sources(sources_of(axes, outputs));
      parts.push_back({outputs, sources, channels_tables(shape, axes, sources, 1)});
    }
  }
};

struct GradientPhase {
  int64_t of[3];
  Axis axes[3];
  TapTables tables;
  int64_t first_weight;  // of this phase among a group's packed weights
};

struct InputPart {
  Box inputs;
  Layout grads;
  std::vector<GradientPhase> phases;
};

struct InputPlan {
  bool folds;
  int64_t weights = 0;  // packed weights a group, all phases
  std::vector<InputPart> parts;

  InputPlan(const ConvShape& shape, const OutputPlan& outputs, const int64_t (&parts_of)[3], bool wanted)
      : folds(shape.mode != PaddingMode::zeros) {
    for (size_t i = 0; i < outputs.parts.size(); ++i) {
      Box inputs = part_of(shape.in, parts_of, int64_t(i)), grads = outputs.parts[i].outputs;
      for (int dimension = 0; wanted && dimension < 3; ++dimension) {
        if (folds) inputs[dimension] = padded_places(shape, dimension);
        grads[dimension] = grads[dimension].united(gradient_sources(shape, dimension, inputs[dimension]));
      }
      parts.push_back({inputs, Layout(grads), {}});
      if (wanted) add_phases(shape, parts.back());
    }
  }

 private:
  void add_phases(const ConvShape& shape, InputPart& part) {
    weights = 0;
    for (int64_t d = 0; d < shape.stride[0]; ++d)
      for (int64_t h = 0; h < shape.stride[1]; ++h)
        for (int64_t w = 0; w < shape.stride[2]; ++w) {
          GradientPhase phase{
              {d, h, w},
              {gradient_axis(shape, 0, d), gradient_axis(shape, 1, h), gradient_axis(shape, 2, w)},
              {},
              weights};
          phase.tables = channels_tables(shape, phase.axes, part.grads, shape.multiplier);
          weights += phase.tables.packed();
          part.phases.push_back(std::move(phase));
        }
  }
};

// The input gradient of one part for `groups` groups, from grad_outputs in scratch, into an image that starts at the
// first place of `image`.
template <class To, class LanesOf>
void input_gradient(const ConvShape& shape, const InputPart& part, int64_t groups, LanesOf&& lanes_of,
                    const float* grad, const float* weights, int64_t weights_step, const Box& image, To* to) {
  const int64_t grad_step = part.grads.floats * shape.multiplier;
  for (const GradientPhase& phase : part.phases) {
    Box targets;
    for (int i = 0; i < 3; ++i) targets[i] = gradient_targets(shape, i, phase.of[i], part.inputs[i]);
    sweep_channels(phase.axes, targets, groups, [&](int64_t group, const TilePlace& tile) {
      const Lanes lanes = lanes_of(group);
      const int64_t place = lanes.channels, row = image[2].size() * place, plane = image[1].size() * row;
      const int64_t d = gradient_place(shape, 0, phase.of[0], tile.depth) - image[0].begin;
      const int64_t h = gradient_place(shape, 1, phase.of[1], tile.height) - image[1].begin;
      const int64_t w = gradient_place(shape, 2, phase.of[2], tile.width) - image[2].begin;
      const float* const source = grad + group * grad_step + source_offset(phase.axes, part.grads, tile);
      const float* const packed = weights + group * weights_step + phase.first_weight * LANES;
      correlate_into(phase.tables, tile, source, packed, nullptr, lanes,
                     to + d * plane + h * row + w * place + lanes.first,
                     phase.axes[2].period * shape.stride[2] * place, shape.stride[1] * row);
    });
  }
}

// Adds every padded place's gradient to the place it was read from, and stores the sums.
template <class T>
void fold(const ConvShape& shape, const Box& padded, const float* wide, const Lanes& lanes, T* to) {
  float* const folded = scratch(Slot::folded, shape.in_size() * LANES);
  std::memset(folded, 0, shape.in_size() * LANES * sizeof(float));
  for (int64_t depth = padded[0].begin; depth < padded[0].end; ++depth)
    for (int64_t height = padded[1].begin; height < padded[1].end; ++height)
      for (int64_t width = padded[2].begin; width < padded[2].end; ++width, wide += LANES) {
        const int64_t d = source_place(depth, shape.in[0], shape.mode);
        const int64_t h = source_place(height, shape.in[1], shape.mode);
        const int64_t w = source_place(width, shape.in[2], shape.mode);
        float* const sum = folded + ((d * shape.in[1] + h) * shape.in[2] + w) * LANES;
        store(sum, add(load(sum), load(wide)));
      }
  for (int64_t i = 0; i < shape.in_size(); ++i)
    store_place(to + i * lanes.channels + lanes.first, load(folded + i * LANES), lanes);
}

}  // namespace

template <class T>
void conv_forward_channels(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel) {
  if (reads_in_place(shape)) return forward_in_place(shape, args, parallel);
  const int64_t groups = group_count(shape), multiplier = shape.multiplier;
  const int64_t together = std::min(groups, GROUPS_TOGETHER);
  int64_t parts_of[3];
  choose_parts(shape, LANES * together, parts_of);
  const OutputPlan plan(shape, parts_of);
  const int64_t parts = int64_t(plan.parts.size()), units = shape.batch * parts;
  const int64_t blocks = std::clamp(ceil_div(TASKS, units), ceil_div(groups, together), groups);
  const std::vector<int64_t>& order = plan.parts[0].tables.order;
  const int64_t kernel = int64_t(order.size()) * LANES, kernel_step = kernel + LANES;

  float* const weights = scratch(Slot::shared_weights, groups * multiplier * kernel_step);
  parallel(groups, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * multiplier; i < end * multiplier; ++i) {
      const Lanes lanes = output_lanes(shape, i / multiplier, i % multiplier);
      pack_weights(shape, order, args.weight, i / multiplier, i % multiplier, weights + i * kernel_step);
      store(weights + i * kernel_step + kernel,
            args.bias ? load_place(args.bias + lanes.first, lanes) : zero());
    }
  });

  parallel(units * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / blocks, block = task % blocks;
      const int64_t first_group = groups * block / blocks,
                    count = groups * (block + 1) / blocks - first_group;
      const OutputPart& part = plan.parts[unit % parts];
      const T* const input = args.input + unit / parts * shape.in_size() * shape.channels;
      T* const output = args.output + unit / parts * shape.out_size() * shape.output_channels();
      float* const source = scratch(Slot::source, part.sources.floats * count);
      load_box(
          input, shape.in, count, [&](int64_t g) { return input_lanes(shape, first_group + g); }, shape.mode,
          part.sources, source, part.sources.floats);
      for (int64_t j = 0; j < multiplier; ++j)
        sweep_channels(plan.axes, part.outputs, count, [&](int64_t g, const TilePlace& tile) {
          const Lanes lanes = output_lanes(shape, first_group + g, j);
          const float* const packed = weights + ((first_group + g) * multiplier + j) * kernel_step;
          const float* const first =
              source + g * part.sources.floats + source_offset(plan.axes, part.sources, tile);
          const int64_t place = (tile.depth * shape.out[1] + tile.height) * shape.out[2] + tile.width;
          correlate_into(part.tables, tile, first, packed, packed + kernel, lanes,
                         output + place * lanes.channels + lanes.first, plan.axes[2].period * lanes.channels,
                         shape.out[2] * lanes.channels);
        });
    }
  });
}

template <class T>
void conv_backward_channels(const ConvShape& shape, const BackwardArgs<T>& args,
                            const ParallelFor& parallel) {
  if (reads_in_place(shape)) return backward_in_place(shape, args, parallel);
  const int64_t groups = group_count(shape), multiplier = shape.multiplier;
  const int64_t blocks = ceil_div(groups, GROUPS_TOGETHER);
  int64_t parts_of[3] = {1, 1, 1};
  if (shape.mode == PaddingMode::zeros)
    choose_parts(shape, LANES * (1 + multiplier) * ceil_div(groups, blocks), parts_of);
  const OutputPlan plan(shape, parts_of);
  const InputPlan input_plan(shape, plan, parts_of, args.grad_input != nullptr);
  const int64_t parts = int64_t(plan.parts.size()), units = shape.batch * parts;

  // A block of groups sums its units in order, in stretches whose number depends on the shape alone.
  const int64_t stretches = std::min(units, ceil_div(TASKS, blocks));
  const std::vector<int64_t>& order = plan.parts[0].tables.order;
  const int64_t packed = int64_t(order.size()), kernel_sums = (packed + 1) * LANES;
  const int64_t all_sums = groups * multiplier * kernel_sums;
  const bool wants_sums = args.grad_weight || args.grad_bias;
  float* const sums = wants_sums ? scratch(Slot::shared_sums, stretches * all_sums) : nullptr;
  const int64_t weights_step = input_plan.weights * LANES;
  float* const weights = scratch(Slot::shared_weights, groups * weights_step);

  if (args.grad_input)
    parallel(groups, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group)
        for (const GradientPhase& phase : input_plan.parts[0].phases)
          pack_weights(shape, phase.tables.order, args.weight, group, 0,
                       weights + group * weights_step + phase.first_weight * LANES);
    });

  parallel(stretches * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t stretch = task / blocks, block = task % blocks;
      const int64_t first_group = groups * block / blocks,
                    count = groups * (block + 1) / blocks - first_group;
      const auto lanes_of = [&](int64_t g) { return input_lanes(shape, first_group + g); };
      float* const block_sums = sums + stretch * all_sums + first_group * multiplier * kernel_sums;
      if (sums) std::memset(block_sums, 0, count * multiplier * kernel_sums * sizeof(float));
      for (int64_t unit = units * stretch / stretches; unit < units * (stretch + 1) / stretches; ++unit) {
        const OutputPart& part = plan.parts[unit % parts];
        const InputPart& input_part = input_plan.parts[unit % parts];
        const Layout& grads = input_part.grads;
        const T* const grad_output =
            args.grad_output + unit / parts * shape.out_size() * shape.output_channels();
        float* const grad = scratch(Slot::grad, grads.floats * multiplier * count);
        for (int64_t j = 0; j < multiplier; ++j)
          load_box(
              grad_output, shape.out, count,
              [&](int64_t g) { return output_lanes(shape, first_group + g, j); }, PaddingMode::zeros, grads,
              grad + j * grads.floats, grads.floats * multiplier);
        if (args.grad_input) {
          const float* const block_weights = weights + first_group * weights_step;
          T* const to = args.grad_input + unit / parts * shape.in_size() * shape.channels;
          if (!input_plan.folds)
            input_gradient(shape, input_part, count, lanes_of, grad, block_weights, weights_step,
                           box_of(shape.in), to);
          for (int64_t g = 0; input_plan.folds && g < count; ++g) {
            const auto alone = [](int64_t) { return Lanes{0, 1, LANES, LANES}; };
            float* const wide = scratch(Slot::wide, Layout(input_part.inputs).floats);
            input_gradient(shape, input_part, 1, alone, grad + g * grads.floats * multiplier,
                           block_weights + g * weights_step, weights_step, input_part.inputs, wide);
            fold(shape, input_part.inputs, wide, lanes_of(g), to);
          }
        }
        if (!sums) continue;
        float* const source = args.grad_weight ? scratch(Slot::source, part.sources.floats * count) : nullptr;
        if (source)
          load_box(args.input + unit / parts * shape.in_size() * shape.channels, shape.in, count, lanes_of,
                   shape.mode, part.sources, source, part.sources.floats);
        for (int64_t j = 0; j < multiplier; ++j)
          sweep_channels(plan.axes, part.outputs, count, [&](int64_t g, const TilePlace& tile) {
            const float* const first =
                grad + (g * multiplier + j) * grads.floats + grads.at(tile.depth, tile.height, tile.width);
            const float* const from =
                source ? source + g * part.sources.floats + source_offset(plan.axes, part.sources, tile)
                       : nullptr;
            float* const to = block_sums + (g * multiplier + j) * kernel_sums;
            reduce(tile.band, part.tables, tile.range,
                   {from,
                    first,
                    plan.axes[2].period * LANES,
                    source ? to : nullptr,
                    to + packed * LANES,
                    tile.lanes,
                    true,
                    {}});
          });
      }
    }
  });

  if (!sums) return;
  parallel(groups, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * multiplier; i < end * multiplier; ++i) {
      const Lanes lanes = output_lanes(shape, i / multiplier, i % multiplier);
      float* const total = sums + i * kernel_sums;
      for (int64_t stretch = 1; stretch < stretches; ++stretch)
        for (int64_t at = 0; at < kernel_sums; at += LANES)
          store(total + at, add(load(total + at), load(total + stretch * all_sums + at)));
      for (int64_t lane = 0; lane < lanes.count; ++lane) {
        const int64_t o = lanes.first + lane * lanes.step;
        for (int64_t at = 0; args.grad_weight && at < packed; ++at)
          from_float(total[at * LANES + lane], args.grad_weight[o * shape.taps() + order[at]]);
        if (args.grad_bias) from_float(total[packed * LANES + lane], args.grad_bias[o]);
      }
    }
  });
}

#define INSTANTIATE(T)                                                                              \
  template void conv_forward_channels(const ConvShape&, const ForwardArgs<T>&, const ParallelFor&); \
  template void conv_backward_channels(const ConvShape&, const BackwardArgs<T>&, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch

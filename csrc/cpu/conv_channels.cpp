// Depthwise convolution on images in (N, D, H, W, C) order: lanes run along C, bands along W.
//
// A task is a box of one image. For one group of LANES channels at a time the box is copied to float scratch, padding
// and 16-bit widening done on the way, so that a place is one aligned vector and its neighbours follow it. With a depth
// multiplier m, output channel c * m + j of a group is computed for one j at a time; its lanes lie m apart in memory.
#include <cstring>

#include "conv_sweep.h"

namespace pyarch {
namespace {

constexpr int64_t TASKS = 32;          // enough for threads to share, few enough to add up
constexpr int64_t GROUPS_TOGETHER = 4;  // neighbouring groups read neighbouring memory

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

// Where a group's lanes stand in an image of (D, H, W, channels) elements.
struct Lanes {
  int64_t first, step, count;  // first channel, distance between lanes, lanes in use
  int64_t channels;            // of the image
};

template <class T>
ALWAYS_INLINE Vec load_place(const T* place, const Lanes& lanes, Mask mask) {
  if (lanes.step == 1) return lanes.count == LANES ? load(place) : load(place, mask);
  alignas(64) float block[LANES] = {};
  for (int64_t i = 0; i < lanes.count; ++i) block[i] = to_float(place[i * lanes.step]);
  return load(block);
}

template <class T>
ALWAYS_INLINE void store_place(T* place, Vec value, const Lanes& lanes, Mask mask) {
  if (lanes.step == 1) return lanes.count == LANES ? store(place, value) : store(place, value, mask);
  alignas(64) T block[LANES];
  store(block, value);
  for (int64_t i = 0; i < lanes.count; ++i) place[i * lanes.step] = block[i];
}

template <class T>
void load_box(const T* image, const int64_t (&size)[3], const Lanes& lanes, PaddingMode mode, const Layout& layout,
              float* to) {
  const Mask mask = first_lanes(lanes.count);
  const Span width = layout.box[2];
  const int64_t begin = std::clamp<int64_t>(0, width.begin, width.end);
  const int64_t end = std::clamp<int64_t>(size[2], begin, width.end);
  for (int64_t depth = layout.box[0].begin; depth < layout.box[0].end; ++depth) {
    const int64_t d = source_place(depth, size[0], mode);
    for (int64_t height = layout.box[1].begin; height < layout.box[1].end; ++height, to += layout.row) {
      const int64_t h = source_place(height, size[1], mode);
      if (d < 0 || h < 0) {
        std::memset(to, 0, layout.row * sizeof(float));
        continue;
      }
      const T* const row = image + (d * size[1] + h) * size[2] * lanes.channels + lanes.first;
      const auto pad = [&](int64_t from, int64_t until) {
        for (int64_t w = from; w < until; ++w) {
          const int64_t source = source_place(w, size[2], mode);
          const Vec value = source < 0 ? zero() : load_place(row + source * lanes.channels, lanes, mask);
          store(to + (w - width.begin) * LANES, value);
        }
      };
      pad(width.begin, begin);
      for (int64_t w = begin; w < end; ++w)
        store(to + (w - width.begin) * LANES, load_place(row + w * lanes.channels, lanes, mask));
      pad(end, width.end);
    }
  }
}

TapTables channels_tables(const ConvShape& shape, const Axis (&axes)[3], const Layout& layout, int64_t groups) {
  std::vector<int64_t> group;
  for (int64_t g = 0; g < groups; ++g) group.push_back(g * layout.floats);
  return tap_tables(group, scaled(axes[0].taps, layout.plane), scaled(axes[1].taps, layout.row), axes[2].taps, NO_TAPS,
                    axes[2].spacing, LANES, shape.taps());
}

int64_t source_offset(const Axis (&axes)[3], const Layout& layout, const TilePlace& tile) {
  return layout.at(axes[0].first_source(tile.depth), axes[1].first_source(tile.height),
                   axes[2].first_source(tile.width));
}

// Runs one tile into places of an image, `out_step` elements apart.
template <class T>
void correlate_into(const TapTables& tables, const TilePlace& place, CorrelateTile tile, const Lanes& lanes, T* out,
                    int64_t out_step) {
  const Mask mask = first_lanes(lanes.count);
  if constexpr (std::is_same_v<T, float>) {
    if (lanes.step == 1) {
      tile.out = out, tile.out_step = out_step, tile.lanes = mask, tile.all_lanes = lanes.count == LANES;
      return correlate_vector_weights(place.band, tables, place.range, tile);
    }
  }
  alignas(64) float block[BAND * LANES];
  tile.out = block, tile.out_step = LANES, tile.all_lanes = true;
  correlate_vector_weights(place.band, tables, place.range, tile);
  for (int r = 0; r < place.band; ++r) store_place(out + r * out_step, load(block + r * LANES), lanes, mask);
}

int64_t group_count(const ConvShape& shape) { return ceil_div(shape.channels, LANES); }

// The lanes of output channel c * m + j for the channels c of one group.
Lanes output_lanes(const ConvShape& shape, int64_t group, int64_t j) {
  const int64_t first = group * LANES;
  return {first * shape.multiplier + j, shape.multiplier, std::min<int64_t>(LANES, shape.channels - first),
          shape.output_channels()};
}
Lanes input_lanes(const ConvShape& shape, int64_t group) {
  const int64_t first = group * LANES;
  return {first, 1, std::min<int64_t>(LANES, shape.channels - first), shape.channels};
}

// One kernel a lane, in packed order; lanes out of use are zero. `order` may count j as its slowest part.
template <class T>
void pack_weights(const ConvShape& shape, const std::vector<int64_t>& order, const T* weight, int64_t group, int64_t j,
                  float* packed) {
  const Lanes lanes = output_lanes(shape, group, j);
  const int64_t taps = shape.taps();
  const T* const first = weight + lanes.first * taps;
  for (size_t i = 0; i < order.size(); ++i, packed += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane)
      packed[lane] = lane < lanes.count ? to_float(first[lane * lanes.step * taps + order[i]]) : 0.0f;
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
          GradientPhase phase{{d, h, w},
                              {gradient_axis(shape, 0, d), gradient_axis(shape, 1, h), gradient_axis(shape, 2, w)},
                              {},
                              weights};
          phase.tables = channels_tables(shape, phase.axes, part.grads, shape.multiplier);
          weights += phase.tables.packed();
          part.phases.push_back(std::move(phase));
        }
  }
};

// The input gradient of one part and group, from grad_outputs in scratch, into an image that starts at place `origin`.
template <class To>
void input_gradient(const ConvShape& shape, const InputPart& part, const float* grad, const float* weights,
                    const Lanes& lanes, const Box& image, To* to) {
  const int64_t place = lanes.channels, row = image[2].size() * place, plane = image[1].size() * row;
  for (const GradientPhase& phase : part.phases) {
    Box targets;
    for (int i = 0; i < 3; ++i) targets[i] = gradient_targets(shape, i, phase.of[i], part.inputs[i]);
    const int64_t out_step = phase.axes[2].period * shape.stride[2] * place;
    sweep_channels(phase.axes, targets, [&](const TilePlace& tile) {
      const int64_t d = gradient_place(shape, 0, phase.of[0], tile.depth) - image[0].begin;
      const int64_t h = gradient_place(shape, 1, phase.of[1], tile.height) - image[1].begin;
      const int64_t w = gradient_place(shape, 2, phase.of[2], tile.width) - image[2].begin;
      const float* const source = grad + source_offset(phase.axes, part.grads, tile);
      const float* const packed = weights + phase.first_weight * LANES;
      correlate_into(phase.tables, tile, {source, packed, nullptr, nullptr, 0, tile.lanes, true}, lanes,
                     to + d * plane + h * row + w * place + lanes.first, out_step);
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
  const Mask mask = first_lanes(lanes.count);
  for (int64_t i = 0; i < shape.in_size(); ++i)
    store_place(to + i * lanes.channels + lanes.first, load(folded + i * LANES), lanes, mask);
}

}  // namespace

template <class T>
void conv_forward_channels(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel) {
  int64_t parts_of[3];
  choose_parts(shape, LANES, parts_of);
  const OutputPlan plan(shape, parts_of);
  const int64_t parts = int64_t(plan.parts.size()), groups = group_count(shape), units = shape.batch * parts;
  const int64_t blocks = std::clamp<int64_t>(ceil_div(TASKS, units), 1, groups);
  const std::vector<int64_t>& order = plan.parts[0].tables.order;
  const int64_t kernel = int64_t(order.size()) * LANES;

  float* const weights = scratch(Slot::shared_weights, groups * shape.multiplier * (kernel + LANES));
  parallel(groups, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * shape.multiplier; i < end * shape.multiplier; ++i) {
      const int64_t group = i / shape.multiplier, j = i % shape.multiplier;
      const Lanes lanes = output_lanes(shape, group, j);
      float* const to = weights + i * (kernel + LANES);
      pack_weights(shape, order, args.weight, group, j, to);
      const Vec bias = args.bias ? load_place(args.bias + lanes.first, lanes, first_lanes(lanes.count)) : zero();
      store(to + kernel, bias);
    }
  });

  parallel(units * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / blocks, block = task % blocks;
      const OutputPart& part = plan.parts[unit % parts];
      const T* const input = args.input + unit / parts * shape.in_size() * shape.channels;
      T* const output = args.output + unit / parts * shape.out_size() * shape.output_channels();
      float* const source = scratch(Slot::source, part.sources.floats);
      for (int64_t group = groups * block / blocks; group < groups * (block + 1) / blocks; ++group) {
        load_box(input, shape.in, input_lanes(shape, group), shape.mode, part.sources, source);
        for (int64_t j = 0; j < shape.multiplier; ++j) {
          const Lanes lanes = output_lanes(shape, group, j);
          const float* const packed = weights + (group * shape.multiplier + j) * (kernel + LANES);
          sweep_channels(plan.axes, part.outputs, [&](const TilePlace& tile) {
            const int64_t place = (tile.depth * shape.out[1] + tile.height) * shape.out[2] + tile.width;
            const float* const first = source + source_offset(plan.axes, part.sources, tile);
            correlate_into(part.tables, tile, {first, packed, packed + kernel, nullptr, 0, tile.lanes, true}, lanes,
                           output + place * lanes.channels + lanes.first, plan.axes[2].period * lanes.channels);
          });
        }
      }
    }
  });
}

template <class T>
void conv_backward_channels(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel) {
  int64_t parts_of[3] = {1, 1, 1};
  if (shape.mode == PaddingMode::zeros) choose_parts(shape, LANES * (2 + shape.multiplier), parts_of);
  const OutputPlan plan(shape, parts_of);
  InputPlan input_plan(shape, plan, parts_of, args.grad_input != nullptr);
  const bool sums_weights = args.grad_weight || args.grad_bias;
  const int64_t parts = int64_t(plan.parts.size()), units = shape.batch * parts, groups = group_count(shape);
  const int64_t multiplier = shape.multiplier;

  // A block of groups sums its units in order, in stretches whose number depends on the shape alone.
  const int64_t blocks = ceil_div(groups, GROUPS_TOGETHER);
  const int64_t stretches = std::min(units, ceil_div(TASKS, blocks));
  const std::vector<int64_t>& order = plan.parts[0].tables.order;
  const int64_t packed = int64_t(order.size()), kernel_sums = (packed + 1) * LANES;
  const int64_t all_sums = groups * multiplier * kernel_sums;
  float* const sums = sums_weights ? scratch(Slot::shared_sums, stretches * all_sums) : nullptr;
  float* const weights = scratch(Slot::shared_weights, groups * input_plan.weights * LANES);

  if (args.grad_input)
    parallel(groups, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group)
        for (const GradientPhase& phase : input_plan.parts[0].phases)
          pack_weights(shape, phase.tables.order, args.weight, group, 0,
                       weights + (group * input_plan.weights + phase.first_weight) * LANES);
    });

  parallel(stretches * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t stretch = task / blocks, block = task % blocks;
      const int64_t first_group = groups * block / blocks, last_group = groups * (block + 1) / blocks;
      float* const block_sums = sums + stretch * all_sums;
      if (sums)
        std::memset(block_sums + first_group * multiplier * kernel_sums, 0,
                    (last_group - first_group) * multiplier * kernel_sums * sizeof(float));
      for (int64_t unit = units * stretch / stretches; unit < units * (stretch + 1) / stretches; ++unit) {
        const int64_t image = unit / parts;
        const OutputPart& part = plan.parts[unit % parts];
        const InputPart& input_part = input_plan.parts[unit % parts];
        const Layout& grads = input_part.grads;
        float* const grad = scratch(Slot::grad, grads.floats * multiplier);
        for (int64_t group = first_group; group < last_group; ++group) {
          const T* const grad_output = args.grad_output + image * shape.out_size() * shape.output_channels();
          for (int64_t j = 0; j < multiplier; ++j)
            load_box(grad_output, shape.out, output_lanes(shape, group, j), PaddingMode::zeros, grads,
                     grad + j * grads.floats);
          const Lanes lanes = input_lanes(shape, group);
          if (args.grad_input) {
            const float* const group_weights = weights + group * input_plan.weights * LANES;
            T* const to = args.grad_input + image * shape.in_size() * shape.channels;
            if (input_plan.folds) {
              const Lanes alone{0, 1, LANES, LANES};
              float* const wide = scratch(Slot::wide, Layout(input_part.inputs).floats);
              input_gradient(shape, input_part, grad, group_weights, alone, input_part.inputs, wide);
              fold(shape, input_part.inputs, wide, lanes, to);
            } else {
              input_gradient(shape, input_part, grad, group_weights, lanes, box_of(shape.in), to);
            }
          }
          if (!sums) continue;
          float* const source = args.grad_weight ? scratch(Slot::source, part.sources.floats) : nullptr;
          if (source)
            load_box(args.input + image * shape.in_size() * shape.channels, shape.in, lanes, shape.mode, part.sources,
                     source);
          for (int64_t j = 0; j < multiplier; ++j) {
            float* const to = block_sums + (group * multiplier + j) * kernel_sums;
            sweep_channels(plan.axes, part.outputs, [&](const TilePlace& tile) {
              const int64_t from = source ? source_offset(plan.axes, part.sources, tile) : 0;
              const float* const first = grad + j * grads.floats + grads.at(tile.depth, tile.height, tile.width);
              reduce(tile.band, part.tables, tile.range,
                     {source + from, first, plan.axes[2].period * LANES, source ? to : nullptr, to + packed * LANES,
                      tile.lanes, true});
            });
          }
        }
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

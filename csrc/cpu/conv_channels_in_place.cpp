// Depthwise convolution on (N, D, H, W, C) images with zero padding: tiles read the images themselves. A band runs along H
// and its lanes along (W, C), whose vectors follow one another in memory, so a row is read and written from end to end
// and a line, once fetched, serves all rows of a band. Padding is never read: bands, columns and planes leave its taps out.
//
// Where C is no multiple of LANES the last group is moved back over channels already done, by the same thread and with
// the same result.
#include <cstring>

#include "conv_channels.h"
#include "conv_sweep.h"

namespace pyarch {
namespace {

constexpr int64_t PART_BYTES =
    192 * 1024;  // of sources a task: with what it writes, they stay in a second-level cache
constexpr int64_t RUN_BYTES = 128 * 1024;  // of sources a run of groups reads for one place

// One kind of target (outputs, or input places of one phase), read from images of `size` places.
struct Plan {
  Axis axes[3];
  int64_t size[3];
  int64_t channels;
  TapTables tables;
  std::vector<Span> width_taps;  // of every target along the width, from `first_width`
  int64_t first_width;
  int64_t together;  // groups whose sources for one place are read in one run

  Plan(const ConvShape& shape, Axis depth, Axis height, Axis width, const int64_t (&sources)[3], Span widths)
      : axes{std::move(depth), std::move(height), std::move(width)},
        size{sources[0], sources[1], sources[2]},
        channels(shape.channels),
        first_width(widths.begin) {
    const int64_t row = size[2] * channels;
    tables = tap_tables({0}, scaled(axes[0].taps, size[1] * row), NO_TAPS, axes[1].taps,
                        scaled(axes[2].taps, channels), axes[1].spacing, row, shape.taps());
    for (int64_t target = widths.begin; target < widths.end; ++target)
      width_taps.push_back(axes[2].real_taps(target));
    const int64_t lines = (BAND + int64_t(axes[1].taps.size())) * std::max<int64_t>(axes[2].taps.size(), 1);
    together = std::max<int64_t>(1, RUN_BYTES / (lines * LANES * int64_t(sizeof(float))));
  }

  int64_t offset(const TilePlace& tile) const {
    return ((axes[0].first_source(tile.depth) * size[1] + axes[1].first_source(tile.height)) * size[2] +
            axes[2].first_source(tile.width)) *
           channels;
  }
};

Span part(int64_t size, int64_t index, int64_t parts) {
  return {size * index / parts, size * (index + 1) / parts};
}

// How an image is cut into tasks: rows as many as one band, and along the width until a part's sources stay near and
// there is work for many threads.
struct Cut {
  int64_t depths, heights, widths;

  Cut(const ConvShape& shape, int64_t depths, int64_t heights, int64_t widths)
      : depths(depths), heights(ceil_div(heights, BAND)) {
    const int64_t column = (BAND + shape.kernel[1]) * shape.channels * int64_t(sizeof(float));
    const int64_t columns = std::max(PART_BYTES / column, 2 * shape.kernel[2]);
    const int64_t tasks = shape.batch * depths * this->heights;
    this->widths =
        std::clamp(std::max(ceil_div(widths, columns), ceil_div(TASKS, tasks)), int64_t(1), widths);
  }

  int64_t parts() const { return depths * heights * widths; }
};

// Calls visit(first group, groups, tile) for runs of groups at all places of one part of the plan's targets; the groups
// of a run lie LANES channels apart.
template <class Visit>
void sweep_places(const Plan& plan, const Cut& cut, int64_t index, Span all_depths, Span all_heights,
                  Visit&& visit) {
  const Span widths = part(int64_t(plan.width_taps.size()), index % cut.widths, cut.widths);
  const Span heights =
      part(all_heights.size(), index / cut.widths % cut.heights, cut.heights) + all_heights.begin;
  const Span depths =
      part(all_depths.size(), index / cut.widths / cut.heights, cut.depths) + all_depths.begin;
  const int64_t groups = ceil_div(plan.channels, LANES), whole = plan.channels / LANES;
  TilePlace tile;
  tile.lanes = first_lanes(LANES), tile.all_lanes = true, tile.range.height = {0, 1};
  for (tile.depth = depths.begin; tile.depth < depths.end; ++tile.depth) {
    tile.range.depth = plan.axes[0].real_taps(tile.depth);
    sweep_bands(heights, plan.axes[1].period, [&](int64_t height, int rows) {
      tile.height = height, tile.band = rows, tile.range.places = plan.axes[1].real_places(height);
      for (int64_t group = 0, count; group < groups; group += count) {
        count = group == whole ? 1 : std::min(plan.together, whole - group);
        for (int64_t i = widths.begin; i < widths.end; ++i) {
          tile.width = plan.first_width + i, tile.range.lane = plan.width_taps[i];
          visit(group, count, tile);
        }
      }
    });
  }
}

int64_t first_channel(const ConvShape& shape, int64_t group) {
  return std::min(group * LANES, shape.channels - LANES);
}

// Runs the tiles of some groups into an image, `out_step` elements between rows.
template <class T>
void correlate_places(const TapTables& tables, const TilePlace& place, int64_t groups, const T* source,
                      const float* weights, int64_t weights_step, const float* bias, T* out,
                      int64_t out_step) {
  correlate_vector_weights<T>(place.band, tables, place.range,
                              {source,
                               weights,
                               bias,
                               out,
                               ELEMENT<T>,
                               out_step,
                               0,
                               place.lanes,
                               true,
                               {groups, LANES, weights_step, weights_step, LANES}});
}

template <class T>
void pack_group(const TapTables& tables, const T* weight, int64_t taps, float* packed) {
  for (int64_t i = 0; i < tables.packed(); ++i)
    for (int64_t lane = 0; lane < LANES; ++lane)
      packed[i * LANES + lane] = to_float(weight[lane * taps + tables.order[i]]);
}

}  // namespace

bool reads_in_place(const ConvShape& shape) {
  return shape.mode == PaddingMode::zeros && shape.multiplier == 1 && shape.channels >= LANES;
}

template <class T>
void forward_in_place(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel) {
  const int64_t groups = group_count(shape), channels = shape.channels;
  const Plan plan(shape, forward_axis(shape, 0), forward_axis(shape, 1), forward_axis(shape, 2), shape.in,
                  {0, shape.out[2]});
  const int64_t kernel = plan.tables.packed() * LANES;
  float* const weights = scratch(Slot::shared_weights, groups * (kernel + LANES));
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = first_channel(shape, group);
    float* const to = weights + group * (kernel + LANES);
    pack_group(plan.tables, args.weight + first * shape.taps(), shape.taps(), to);
    store(to + kernel, args.bias ? load(args.bias + first) : zero());
  }

  const Cut cut(shape, shape.out[0], shape.out[1], shape.out[2]);
  parallel(shape.batch * cut.parts(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / cut.parts();
      const T* const input = args.input + image * shape.in_size() * channels;
      T* const output = args.output + image * shape.out_size() * channels;
      const int64_t row = shape.out[2] * channels, band_step = plan.axes[1].period * row;
      sweep_places(plan, cut, task % cut.parts(), {0, shape.out[0]}, {0, shape.out[1]},
                   [&](int64_t group, int64_t count, const TilePlace& tile) {
                     const int64_t first = first_channel(shape, group);
                     const float* const packed = weights + group * (kernel + LANES);
                     T* const out =
                         output + (tile.depth * shape.out[1] + tile.height) * row + tile.width * channels;
                     correlate_places(plan.tables, tile, count, input + plan.offset(tile) + first, packed,
                                      kernel + LANES, packed + kernel, out + first, band_step);
                   });
    }
  });
}

template <class T>
void backward_in_place(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel) {
  const int64_t groups = group_count(shape), channels = shape.channels;
  const Plan outputs(shape, forward_axis(shape, 0), forward_axis(shape, 1), forward_axis(shape, 2), shape.in,
                     {0, shape.out[2]});

  // Input places by phase of the stride, each phase with its own taps and weights.
  struct Phase {
    int64_t of[3];
    Plan plan;
    int64_t first_weight;
  };
  std::vector<Phase> phases;
  int64_t kernel = 0;
  for (int64_t d = 0; args.grad_input && d < shape.stride[0]; ++d)
    for (int64_t h = 0; h < shape.stride[1]; ++h)
      for (int64_t w = 0; w < shape.stride[2]; ++w) {
        phases.push_back(
            {{d, h, w},
             {shape, gradient_axis(shape, 0, d), gradient_axis(shape, 1, h), gradient_axis(shape, 2, w),
              shape.out, gradient_targets(shape, 2, w, {0, shape.in[2]})},
             kernel});
        kernel += phases.back().plan.tables.packed() * LANES;
      }
  float* const weights = scratch(Slot::shared_weights, groups * kernel);
  for (int64_t group = 0; group < groups; ++group)
    for (const Phase& phase : phases)
      pack_group(phase.plan.tables, args.weight + first_channel(shape, group) * shape.taps(), shape.taps(),
                 weights + group * kernel + phase.first_weight);

  // Stretches of parts sum their weight gradients in order; how many there are depends on the shape alone.
  const Cut cut(shape, std::min(shape.in[0], shape.out[0]), std::min(shape.in[1], shape.out[1]),
                std::min(shape.in[2], shape.out[2]));
  const int64_t units = shape.batch * cut.parts(), stretches = std::min(units, TASKS);
  const int64_t packed = outputs.tables.packed(), sums_a_group = (packed + 1) * LANES;
  const bool wants_sums = args.grad_weight || args.grad_bias;
  float* const sums = wants_sums ? scratch(Slot::shared_sums, stretches * groups * sums_a_group) : nullptr;

  parallel(stretches, [&](int64_t begin, int64_t end) {
    for (int64_t stretch = begin; stretch < end; ++stretch) {
      float* const own_sums = sums + stretch * groups * sums_a_group;
      if (sums) std::memset(own_sums, 0, groups * sums_a_group * sizeof(float));
      for (int64_t unit = units * stretch / stretches; unit < units * (stretch + 1) / stretches; ++unit) {
        const int64_t image = unit / cut.parts(), index = unit % cut.parts();
        const T* const grad_output = args.grad_output + image * shape.out_size() * channels;
        T* const to = args.grad_input + image * shape.in_size() * channels;
        for (const Phase& phase : phases) {
          const Span planes = gradient_targets(shape, 0, phase.of[0], {0, shape.in[0]});
          const Span rows = gradient_targets(shape, 1, phase.of[1], {0, shape.in[1]});
          const int64_t row = shape.in[2] * channels,
                        band_step = phase.plan.axes[1].period * shape.stride[1] * row;
          sweep_places(phase.plan, cut, index, planes, rows,
                       [&](int64_t group, int64_t count, const TilePlace& tile) {
                         const int64_t first = first_channel(shape, group);
                         const int64_t d = gradient_place(shape, 0, phase.of[0], tile.depth);
                         const int64_t h = gradient_place(shape, 1, phase.of[1], tile.height);
                         const int64_t w = gradient_place(shape, 2, phase.of[2], tile.width);
                         correlate_places(phase.plan.tables, tile, count,
                                          grad_output + phase.plan.offset(tile) + first,
                                          weights + group * kernel + phase.first_weight, kernel, nullptr,
                                          to + (d * shape.in[1] + h) * row + w * channels + first, band_step);
                       });
        }
        if (!sums) continue;
        const T* const input = args.input + image * shape.in_size() * channels;
        const int64_t grad_step = outputs.axes[1].period * shape.out[2] * channels;
        sweep_places(outputs, cut, index, {0, shape.out[0]}, {0, shape.out[1]},
                     [&](int64_t group, int64_t count, const TilePlace& tile) {
                       const int64_t first = first_channel(shape, group);
                       const int64_t place =
                           (tile.depth * shape.out[1] + tile.height) * shape.out[2] + tile.width;
                       float* const group_sums = own_sums + group * sums_a_group;
                       reduce_in_place<T>(tile.band, outputs.tables, tile.range,
                                          {input + outputs.offset(tile) + first,
                                           grad_output + place * channels + first,
                                           grad_step,
                                           args.grad_weight ? group_sums : nullptr,
                                           group_sums + packed * LANES,
                                           tile.lanes,
                                           true,
                                           {count, LANES, sums_a_group, 0, LANES}});
                     });
      }
    }
  });

  if (!sums) return;
  for (int64_t stretch = 1; stretch < stretches; ++stretch)
    for (int64_t at = 0; at < groups * sums_a_group; at += LANES)
      store(sums + at, add(load(sums + at), load(sums + stretch * groups * sums_a_group + at)));
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t o = first_channel(shape, group) + lane;
      const float* const total = sums + group * sums_a_group + lane;
      for (int64_t at = 0; args.grad_weight && at < packed; ++at)
        from_float(total[at * LANES], args.grad_weight[o * shape.taps() + outputs.tables.order[at]]);
      if (args.grad_bias) from_float(total[packed * LANES], args.grad_bias[o]);
    }
}

#define INSTANTIATE(T)                                                                         \
  template void forward_in_place(const ConvShape&, const ForwardArgs<T>&, const ParallelFor&); \
  template void backward_in_place(const ConvShape&, const BackwardArgs<T>&, const ParallelFor&);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch

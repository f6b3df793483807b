// What the kernels on (N, D, H, W, C) images share: groups of LANES channels, and their packed weights.
#pragma once

#include <vector>

#include "conv.h"
#include "conv_plan.h"
#include "vec.h"

namespace pyarch {

constexpr int64_t TASKS = 32;  // enough for threads to share, few enough to add up

// Where a group's lanes stand in an image of (D, H, W, channels) elements.
struct Lanes {
  int64_t first, step, count;  // first channel, distance between lanes, lanes in use
  int64_t channels;            // of the image

  Mask mask() const { return first_lanes(count); }
};

template <class T>
ALWAYS_INLINE Vec load_place(const T* place, const Lanes& lanes) {
  if (lanes.step == 1) return lanes.count == LANES ? load(place) : load(place, lanes.mask());
  alignas(64) float block[LANES] = {};
  for (int64_t i = 0; i < lanes.count; ++i) block[i] = to_float(place[i * lanes.step]);
  return load(block);
}

template <class T>
ALWAYS_INLINE void store_place(T* place, Vec value, const Lanes& lanes) {
  if (lanes.step == 1) return lanes.count == LANES ? store(place, value) : store(place, value, lanes.mask());
  alignas(64) T block[LANES];
  store(block, value);
  for (int64_t i = 0; i < lanes.count; ++i) place[i * lanes.step] = block[i];
}

inline int64_t group_count(const ConvShape& shape) { return ceil_div(shape.channels, LANES); }

// The lanes of output channel c * m + j for the channels c of one group.
inline Lanes output_lanes(const ConvShape& shape, int64_t group, int64_t j) {
  const int64_t first = group * LANES;
  return {first * shape.multiplier + j, shape.multiplier, std::min<int64_t>(LANES, shape.channels - first),
          shape.output_channels()};
}
inline Lanes input_lanes(const ConvShape& shape, int64_t group) {
  const int64_t first = group * LANES;
  return {first, 1, std::min<int64_t>(LANES, shape.channels - first), shape.channels};
}

// One kernel a lane, in packed order; lanes out of use are zero. `order` may count j as its slowest part.
template <class T>
void pack_weights(const ConvShape& shape, const std::vector<int64_t>& order, const T* weight, int64_t group,
                  int64_t j, float* packed) {
  const Lanes lanes = output_lanes(shape, group, j);
  const int64_t taps = shape.taps();
  const T* const first = weight + lanes.first * taps;
  for (size_t i = 0; i < order.size(); ++i, packed += LANES)
    for (int64_t lane = 0; lane < LANES; ++lane)
      packed[lane] = lane < lanes.count ? to_float(first[lane * lanes.step * taps + order[i]]) : 0.0f;
}

// Kernels small enough that their tiles read the images themselves, with no copy; see conv_channels_in_place.cpp.
bool reads_in_place(const ConvShape& shape);
template <class T>
void forward_in_place(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel);
template <class T>
void backward_in_place(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel);

}  // namespace pyarch

// From a convolution's shape to the tables and boxes its tiles work on; everything here is per call, not per plane.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "conv.h"
#include "conv_tile.h"
#include "integers.h"

namespace pyarch {

// A box of places, in depth, height, width.
struct Box {
  Span span[3];

  const Span& operator[](int dimension) const { return span[dimension]; }
  Span& operator[](int dimension) { return span[dimension]; }
  Box united(const Box& other) const {
    return {span[0].united(other[0]), span[1].united(other[1]), span[2].united(other[2])};
  }
};

inline Box box_of(const int64_t (&size)[3]) { return {{{0, size[0]}, {0, size[1]}, {0, size[2]}}}; }

// One kernel element of one dimension: its share of the flat tap number, and where it reads.
struct Tap {
  int64_t number, at;
};
using Taps = std::vector<Tap>;

// How the targets along one dimension read their sources: place = target * step + offset + tap.at, taps ascending.
struct Axis {
  Taps taps;
  int64_t step, offset;
  int64_t sources;       // places [0, sources) are real, all others padding
  bool padding_is_zero;  // then taps on padding may be skipped
  int64_t spacing,
      period;  // in a band, neighbours lie `spacing` sources and `period` targets apart and share sources

  int64_t first_source(int64_t target) const { return target * step + offset; }
  Span sources_of(Span targets) const;
  Span real_taps(int64_t target) const;
  Span real_places(int64_t target) const;
};

// All sources of a box of targets.
inline Box sources_of(const Axis (&axes)[3], const Box& targets) {
  return {axes[0].sources_of(targets[0]), axes[1].sources_of(targets[1]), axes[2].sources_of(targets[2])};
}

// Outputs read inputs.
Axis forward_axis(const ConvShape& shape, int dimension);

// Input places stride * target + phase - before, of one phase, read grad_outputs.
Axis gradient_axis(const ConvShape& shape, int dimension, int64_t phase);

// The targets of `gradient_axis` that are input places within `inputs`, and the first such place.
Span gradient_targets(const ConvShape& shape, int dimension, int64_t phase, Span inputs);
inline int64_t gradient_place(const ConvShape& shape, int dimension, int64_t phase, int64_t target) {
  return target * shape.stride[dimension] + phase - shape.before[dimension];
}

// Every grad_output that input places read, over all phases.
Span gradient_sources(const ConvShape& shape, int dimension, Span inputs);

// The input places that are read, padding included.
inline Span padded_places(const ConvShape& shape, int dimension) {
  return forward_axis(shape, dimension)
      .sources_of({0, shape.out[dimension]})
      .united({0, shape.in[dimension]});
}

// `depth`, `height` and `lane` hold offsets in elements, `band` places of `band_unit` elements each. `merges` makes chunks
// that begin at different places into lane taps of one; then no chunk can be skipped.
TapTables tap_tables(std::vector<int64_t> group, const Taps& depth, const Taps& height, const Taps& band,
                     const Taps& lane, int64_t spacing, int64_t band_unit, int64_t taps_a_group,
                     bool merges = false);

inline const Taps NO_TAPS = {{0, 0}};
Taps scaled(Taps taps, int64_t unit);

constexpr int64_t FAR = std::numeric_limits<int64_t>::max() / 4;
constexpr Span EVERYWHERE = {-FAR, FAR};

// Part `index` of a volume cut into parts[0] x parts[1] x parts[2] boxes.
Box part_of(const int64_t (&size)[3], const int64_t (&parts)[3], int64_t index);

// How many parts keep a part's sources, `floats_a_place` each, within the second-level cache.
void choose_parts(const ConvShape& shape, int64_t floats_a_place, int64_t (&parts)[3]);

// Where a padded place is read from, or -1 for a zero.
int64_t source_place(int64_t place, int64_t size, PaddingMode mode);

// Uninitialised, 64-byte aligned floats that live as long as the thread; one buffer a slot, grown as needed.
enum class Slot { source, grad, wide, folded, weights, sums, line, shared_weights, shared_sums, count };
float* scratch(Slot slot, int64_t floats);

}  // namespace pyarch

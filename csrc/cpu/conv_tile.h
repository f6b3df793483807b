// The two micro-kernels of depthwise convolution: a band of outputs held in registers, and a band of taps.
//
// Both see memory the same way. A band is a run of up to BAND output vectors whose sources lie `band_step` floats apart;
// a chunk is a series of up to CHUNK taps, each one `band_step` further than the one before. So one load of source
// vector r + k serves every output r and tap k of the band and chunk: (R + K - 1) loads for R * K multiply-adds.
//
//   correlate:  out[r] (+)= sum over chunks, lane taps, outer taps, k:  weight[k] * source[(r + k) * band_step]
//   reduce:     grad[k]  +=  sum over r:                                grad_out[r] * source[(r + k) * band_step]
//
// What a band is depends on the layout: rows of a plane with lanes along W ("rows"), vectors along W when there are few
// rows ("line"), or pixels along W with lanes along C ("channels"). Only the tables differ.
#pragma once

#include <type_traits>
#include <vector>

#include "vec.h"

namespace pyarch {

constexpr int BAND = REGISTERS == 32 ? 14 : 6;
constexpr int CHUNK = 7;

// An interval of places along one dimension.
struct Span {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
  Span united(Span other) const {
    return {begin < other.begin ? begin : other.begin, end > other.end ? end : other.end};
  }
  Span operator+(int64_t shift) const { return {begin + shift, end + shift}; }
  Span within(Span other) const {
    return {begin > other.begin ? begin : other.begin, end < other.end ? end : other.end};
  }
};

struct Chunk {
  int taps;
  int64_t source;  // offset of its first tap, in elements
  int64_t weight;  // position of its first weight within an outer tap, in packed weights
  int64_t step;    // packed weights from one lane tap to the next
  int64_t at;      // its first tap's place along the band's dimension
  Span lane;       // its lane taps
};

// The taps of one convolution as offsets into a source. A packed weight's position is
//   ((group * depth taps + depth tap) * height taps + height tap) * inner + chunk.weight + (lane tap - chunk.lane.begin) * chunk.step + k.
struct TapTables {
  std::vector<int64_t> group, depth, height, lane;  // source offsets of the outer taps, and of the lane taps
  std::vector<Chunk> chunks;                        // sorted by their number of taps
  int64_t inner = 0;                                // packed weights an outer tap
  int64_t band_step = 0;                            // elements between neighbours in a band
  int64_t spacing = 1;                              // the same in places along the band's dimension
  std::vector<int64_t> order;  // the tap (within one kernel), and group * taps, of every packed position

  int64_t packed() const { return int64_t(order.size()); }
};

// The outer taps, and the places along the band's dimension, whose sources are not padding, for one tile.
struct TapRange {
  Span depth, height, lane;
  Span places;  // relative to the source of the tile's first output

  // Of a chunk's `sources`, `spacing` places apart, those that are not padding.
  Span real_sources(const Chunk& chunk, int64_t sources, int64_t spacing) const {
    if (places.begin <= chunk.at && places.end > chunk.at + (sources - 1) * spacing) return {0, sources};
    const auto first_from = [&](int64_t place) {
      return place <= chunk.at ? 0 : (place - chunk.at + spacing - 1) / spacing;
    };
    return {first_from(places.begin), first_from(places.end)};
  }
};

// Several tiles of one band size in a row, in one call: what to add to get from one tile to the next.
struct Run {
  int64_t count = 1;
  int64_t source = 0, weights = 0, start = 0, out = 0;  // in elements; for reduce, `out` is grad_out's step
};

enum class Element { float32, bfloat16, float16 };
template <class T>
constexpr Element ELEMENT = std::is_same_v<T, float>      ? Element::float32
                            : std::is_same_v<T, bfloat16> ? Element::bfloat16
                                                          : Element::float16;

// Sources are scratch floats, or elements of a tensor itself.
template <class T = float>
struct CorrelateTile {
  const T* source;       // of the band's first output, first taps
  const float* weights;  // packed: one float each (rows, line) or LANES floats each (channels)
  const float* start;    // added to every output: one float, or LANES floats; may be null
  void* out;             // of type `element`
  Element element;
  int64_t out_step;
  int64_t fetch_out;  // how far ahead the memory to be written is fetched, in elements; 0 fetches none
  Mask lanes;
  bool all_lanes;
  Run run;
  bool streams = false;  // floats past the caches, to addresses that are multiples of a vector
};

template <class T = float>
struct ReduceTile {
  const T* source;
  const T* grad_out;
  int64_t grad_step;
  float* grad_weights;  // packed, LANES floats each, added to; may be null
  float* grad_bias;     // LANES floats, added to
  Mask lanes;
  bool all_lanes;
  Run run;  // `weights` is the step of both sums
};

// The order in which a chunk's sources are visited, first and second half in turn: neighbouring sources add to the same
// sums, which would wait for one another.
constexpr int visited(int step, int sources) { return step % 2 ? (sources + 1) / 2 + step / 2 : step / 2; }

// Where a source is read from: padding is a vector of zeros.
template <class T>
ALWAYS_INLINE const T* source_or_zeros(const T* source, int at, Span real) {
  alignas(64) static constexpr T zeros[LANES] = {};
  return at >= real.begin && at < real.end ? source : zeros;
}

// Calls visit with `band` as a constant.
template <class Visit>
ALWAYS_INLINE void with_band(int band, Visit&& visit) {
  unrolled<BAND>([&](auto index) {
    if (band == index + 1) visit(std::integral_constant<int, index + 1>{});
  });
}

// `band` outputs, 1 <= band <= BAND. Vector weights have one value a lane, scalar weights one for all lanes. With vector
// weights, and in `reduce_in_place`, sources outside range.places are padding: zeros stand in for them.
void correlate_scalar_weights(int band, const TapTables& taps, const TapRange& range,
                              const CorrelateTile<>& tile);
template <class T>
void correlate_vector_weights(int band, const TapTables& taps, const TapRange& range,
                              const CorrelateTile<T>& tile);
void reduce(int band, const TapTables& taps, const TapRange& range, const ReduceTile<>& tile);
template <class T>
void reduce_in_place(int band, const TapTables& taps, const TapRange& range, const ReduceTile<T>& tile);

}  // namespace pyarch

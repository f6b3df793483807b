// The micro-kernels of small kernels on rows that are read where they are, with no copy.
//
// A strip is LANES neighbouring columns of targets. It is walked down row by row: a source row is loaded once a tap along
// the width, and adds to every target row that reads it while those are held in registers.
//
//   correlate:  out[t, w]     = bias + sum_kh,kw weight[kh, kw] * source[S * t + kh, S * w + kw]
//   reduce:     sums[kh, kw] += sum_t        grad_out[t, w] * source[S * t + kh, S * w + kw]
//
// Padding is never read: rows of it are left out, lanes of it are masked off.
//
// Legend: t target row, w target column, S stride, (kh, kw) kernel element; a walk's source rows lie `dilation` apart.
#pragma once

#include "conv_tile.h"

namespace pyarch {

// Lanes [begin, end) of a vector.
#if defined(__AVX512F__)

using Between = Mask;
inline Between lanes_between(Span lanes) {
  return lanes.size() <= 0 ? Mask(0) : Mask(first_lanes(lanes.end) & ~first_lanes(lanes.begin));
}

#else

struct Between {
  int begin, end;
  __m256i lanes;
};
inline Between lanes_between(Span lanes) {
  const int begin = int(lanes.begin), end = int(lanes.end < lanes.begin ? lanes.begin : lanes.end);
  return {begin, end, _mm256_andnot_si256(lanes_of({begin}), lanes_of({end}))};
}
ALWAYS_INLINE Vec load(const float* p, const Between& between) {
  return _mm256_maskload_ps(p, between.lanes);
}
ALWAYS_INLINE void store(float* p, Vec v, const Between& between) {
  _mm256_maskstore_ps(p, between.lanes, v);
}
template <class Half>
ALWAYS_INLINE Vec load(const Half* p, const Between& between) {
  Half block[LANES] = {};
  for (int i = between.begin; i < between.end; ++i) block[i] = p[i];
  return load(block);
}
template <class Half>
ALWAYS_INLINE void store(Half* p, Vec v, const Between& between) {
  Half block[LANES];
  store(block, v);
  for (int i = between.begin; i < between.end; ++i) p[i] = block[i];
}

#endif

// Columns [column, column + lanes in use) of the targets.
struct Strip {
  int64_t column;
  Mask lanes;
  bool all_lanes;
  bool inside;  // every lane of every load is real and in use
  Between loads[8];
};

// The rows that a strip visits, and how far they lie apart, in elements.
struct Walk {
  int64_t targets;
  Span real;  // source rows that are no padding, counted from the first target's first tap
  int64_t source_step, target_step;
  int64_t tap_step;                    // between taps along the width
  int64_t fetch_source, fetch_target;  // how far ahead memory is fetched
};

// The strips that cover `targets` columns. `exact` visits every target once and masks the last lanes; otherwise the last
// strip is moved back over columns already visited.
struct StripPlan {
  int taps, stride;
  int64_t dilation, before, sources;
  std::vector<Strip> strips(int64_t targets, bool exact) const;
};

// Square kernels: 3x3 of stride 1 or 2, 5x5 and 7x7 of stride 1. `source` and `out` are those of the plane's first column
// and the walk's first row; `sums` has LANES floats a tap and LANES of grad_out's own sum.
constexpr int LARGEST_KERNEL = 7;
template <class T>
void correlate_strips(int taps, int stride, const Walk& walk, const std::vector<Strip>& strips,
                      const T* source, const float* weights, float bias, T* out);
template <class T>
void reduce_strips(int taps, int stride, const Walk& walk, const std::vector<Strip>& strips, const T* source,
                   const T* grad_out, float* sums);

// The input's gradient at stride 2: each grad_output is spread over the inputs it read. With u = h + before, v likewise,
//   grad_input[u, v] = sum of weight[kh, kw] * grad_out[(u - kh) / 2, (v - kw) / 2] where both are whole,
// so a pair of rows (2a, 2a + 1) and LANES pairs of columns are made from rows a - 1 and a, columns b - 1 and b.
struct SpreadStrip {
  int64_t pair;  // its first pair of columns
  bool inside;   // every lane of every load and store is real
  Between loads[2], stores[2];
};

struct SpreadPlan {
  int64_t before[2], sources[2], targets[2];  // height, width; sources are grad_outputs, targets are inputs
  int64_t next;                               // how many planes on the next one lies
  std::vector<SpreadStrip> strips() const;
};

// Rows [rows.begin, rows.end) of one plane; `weights` in the kernel's own order.
template <class T>
void spread_strips(const SpreadPlan& plan, Span rows, const std::vector<SpreadStrip>& strips,
                   const T* grad_out, const float* weights, T* grad_input);

// A row of taps along the width alone, stride 1, `taps` from 2 to 4: targets [columns.begin, columns.end) of one row.
struct Line {
  int taps;
  int64_t sources, before, dilation;
};
inline bool has_line_kernel(int64_t taps) { return taps >= 2 && taps <= 4; }

// `source` and `out` are those of the row's first column. `streams` writes floats past the caches.
template <class T>
void correlate_line(const Line& line, Span columns, const T* source, const float* weights, float bias, T* out,
                    bool streams);
template <class T>
void reduce_line(const Line& line, Span columns, const T* source, const T* grad_out, float* sums);

}  // namespace pyarch

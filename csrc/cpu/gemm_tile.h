// The micro-kernel of matrix products: a tile of C held in registers over a stretch of k.
//
// The tile is up to ROWS rows of two vectors of columns. Each step loads the two vectors of B and multiplies them
// with one broadcast step of A a row. In tile registers a step of two of them is 16 at once.
#pragma once

#include "gemm_pack.h"

namespace pyarch {

constexpr int ROWS = REGISTERS == 32 ? 14 : 6;
constexpr int PANEL = 2 * LANES;

// A strip of A: its rows, and how many floats a step it takes, packed.
template <class T>
constexpr int64_t STRIP_ROWS = IN_TILES<T> ? 2 * LANES : ROWS;
template <class T>
constexpr int64_t STRIP_FLOATS = IN_TILES<T> ? 2 * LANES : LANES;

template <class Out>
struct Tile {
  const float*
      a;  // packed, a vector of rows a step; in tile registers squares of either half of the rows in turn
  const float* b;  // packed, PANEL columns a step; in tile registers whole squares, zero beyond the steps
  int64_t steps;
  int64_t columns;  // of PANEL, that C has

  // The tile's sum: (+ bias) (+ sums so far) (+ C), kept as a sum or, where keep_sums is null, rounded into C.
  const float* bias;
  const float* sums;
  float* keep_sums;  // PANEL floats a row, as `sums`
  bool accumulate;
  Target<Out> c;
};

// S is the step that T is packed in: Step<T>.
template <class S, class Out>
void multiply_tile(int64_t rows, const Tile<Out>& tile);

}  // namespace pyarch

// The product of one time step, C[rows, columns] = init + A[rows, depth] * W[depth, columns], on weights packed once a
// call.
//
// Packed weights are panels of `width` vectors of columns; a panel holds, for each step of the depth, its vectors one
// after another. A tile keeps rows * width accumulators in registers, so the width follows the number of rows. Sums run
// in float32. Operands are floats, or, where the CPU multiplies them, pairs of bfloat16: one 32-bit cell either way, of
// one or two steps of the depth. Tile registers take panels of one vector and 16 cells of the depth at a time.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "integers.h"
#include "tile_registers.h"
#include "vec.h"

namespace pyarch {

// The operand in which elements T are multiplied.
#if defined(__AVX512BF16__)
template <class T>
using operand_of = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float>;
#else
template <class T>
using operand_of = float;
#endif

// Steps of the depth a 32-bit cell.
template <class Operand>
constexpr int64_t PER_CELL = 4 / sizeof(Operand);

// Vectors a panel, and the most rows of its tiles: as many accumulators as the registers hold beside the weights.
struct PanelShape {
  int width, rows;
};
#if defined(__AVX512F__)
constexpr PanelShape PANEL_SHAPES[] = {{12, 1}, {8, 2}, {4, 6}, {3, 8}};
#else
constexpr PanelShape PANEL_SHAPES[] = {{12, 1}, {8, 1}, {4, 3}, {3, 4}};
#endif

// The width of panels for tile registers, and the rows from which on these are faster. So many rows, as evenly as they
// go, are a strip that one register takes.
constexpr int TILE_WIDTH = 1;
constexpr int64_t LEAST_ROWS_IN_TILES = 3;
constexpr int64_t tile_rows(int64_t rows) { return ceil_div(rows, ceil_div(rows, 16)); }

// Rows behind the last one that a product's A has: they may be read, with nothing coming of it.
template <class Operand>
constexpr int64_t SPARE_ROWS = IN_TILES<Operand> ? 15 : 0;

// Of the panels whose tiles take all rows at once those that pad the columns least, of these the widest.
template <class Operand>
int panel_width(int64_t rows, int64_t columns) {
  if (IN_TILES<Operand> && rows >= LEAST_ROWS_IN_TILES) return TILE_WIDTH;
  int best = 0;
  for (const PanelShape& shape : PANEL_SHAPES) {
    const bool takes_all = rows <= shape.rows || &shape + 1 == std::end(PANEL_SHAPES);
    if (takes_all && (!best || round_up(columns, shape.width * LANES) < round_up(columns, best * LANES)))
      best = shape.width;
  }
  return best;
}

template <class Operand>
struct Packed {
  const Operand* cells;
  int64_t depth;    // in cells
  int64_t columns;  // a multiple of the panel's
  int width;
  int64_t tile_rows;  // that tile registers are set up for

  static int64_t padded_columns(int64_t columns, int width) {
    return round_up(columns, int64_t(width) * LANES);
  }
  static int64_t padded_depth(int64_t depth) {
    return round_up(depth, (IN_TILES<Operand> ? 16 : 1) * PER_CELL<Operand>);
  }
};

// C[r, :] = init[r, :] + A[r, :] * W. Rows of `init` may be one (init_stride 0) or C itself; C has all padded columns,
// A all padded depth, zero where the weights are. Calls of every other `turn` visit the panels last to first: what the
// call before left in the caches comes first.
template <class Operand>
struct Product {
  const Operand* a;
  int64_t a_stride;
  const float* init;
  int64_t init_stride;
  float* c;
  int64_t c_stride;
};
template <class Operand>
void multiply(int64_t rows, const Product<Operand>& product, const Packed<Operand>& weights, int64_t turn);

// The same in tile registers: panels of TILE_WIDTH.
void multiply_in_tiles(int64_t rows, const Product<bfloat16>& product, const Packed<bfloat16>& weights,
                       int64_t turn);

// Packs `count` columns from column `at` on, a multiple of LANES, of the matrix whose columns are rows of a source:
// W[k, at + j] = source[j * stride + k].
template <class T, class Operand>
void pack_rows_as_columns(Operand* cells, int width, int64_t depth, int64_t at, const T* source,
                          int64_t stride, int64_t count);

// Packs one panel: W[k, j] = source[((k + first) % depth) * stride + j] for `count` columns, zero beyond.
template <class T, class Operand>
void pack_panel(Operand* cells, int width, int64_t depth, int64_t first, const T* source, int64_t stride,
                int64_t count);

// y[r, j] = bias[j] + sum_k x[r, k] * w[j, k] for `count` columns on unpacked weights: where they are read only a few
// times. X is T or float.
template <class X, class T>
void multiply_unpacked(int64_t rows, const X* x, int64_t x_stride, const T* w, int64_t depth,
                       const float* bias, int64_t count, float* y, int64_t y_stride);

// c[r, j] = (accumulate ? c[r, j] : 0) + sum_k a[r, k] * w[(k + first) % depth, j] for `count` columns of unpacked
// weights whose rows are `w_stride` apart.
template <class T, class C>
void multiply_unpacked_columns(int64_t rows, const T* a, int64_t a_stride, const T* w, int64_t w_stride,
                               int64_t depth, int64_t first, int64_t count, bool accumulate, C* c,
                               int64_t c_stride);

// c[m, n] = sum_r a[r, m] * b[r, n] for a few rows r.
template <class T>
void outer_products(int64_t rows, const T* a, int64_t a_stride, int64_t m, const T* b, int64_t b_stride,
                    int64_t n, T* c);

}  // namespace pyarch

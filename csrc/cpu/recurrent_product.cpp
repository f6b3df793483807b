// Packing and micro-kernels of the product of one time step.
#include "recurrent_product.h"

namespace pyarch {
namespace {

// ------------------------------------------------------------------------------ cells

ALWAYS_INLINE Vec broadcast_cell(const float* p) { return broadcast(*p); }
ALWAYS_INLINE Vec load_cells(const float* p) { return load(p); }
ALWAYS_INLINE Vec multiply_add(Vec a, Vec w, Vec sum, float) { return fma(a, w, sum); }

#if defined(__AVX512BF16__)
ALWAYS_INLINE Vec broadcast_cell(const bfloat16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}
ALWAYS_INLINE Vec load_cells(const bfloat16* p) { return load_pairs(p); }
ALWAYS_INLINE Vec multiply_add(Vec a, Vec w, Vec sum, bfloat16) { return dot_pairs(a, w, sum); }
#endif

// ------------------------------------------------------------------------------ tile

// `back`: from the last step of the depth to the first.
// `init` is added last: sums that began with it would be rounded to its size at every step. With few accumulators, steps of the depth go to two sets of them in turn: a multiply-add need not wait for the last.
template <class Operand, int ROWS, int WIDTH>
__attribute__((noinline)) void tile(int64_t depth, Product<Operand> product, const Operand* w, bool back) {
  constexpr int64_t CELL = PER_CELL<Operand>, WEIGHTS = WIDTH * LANES * CELL;
  constexpr int SETS = ROWS * WIDTH <= 6 ? 2 : 1;
  const auto [a_begin, a_stride, init, init_stride, c, c_stride] = product;
  const Operand* a = back ? a_begin + (depth - 1) * CELL : a_begin;
  const int64_t a_step = back ? -CELL : CELL, w_step = back ? -WEIGHTS : WEIGHTS;
  if (back) w += (depth - 1) * WEIGHTS;
  Vec sums[SETS][ROWS][WIDTH];
  unrolled<SETS>([&](auto set) {
    unrolled<ROWS>([&](auto r) { unrolled<WIDTH>([&](auto v) { sums[set][r][v] = zero(); }); });
  });
  const auto step = [&](auto set) INLINED {
    Vec weights[WIDTH];
    unrolled<WIDTH>([&](auto v) {
      Vec loaded = load_cells(w + v * LANES * CELL);
      if constexpr (ROWS > 1) IN_REGISTER(loaded);
      weights[v] = loaded;
    });
    unrolled<ROWS>([&](auto r) {
      const Vec value = broadcast_cell(a + r * a_stride);
      unrolled<WIDTH>(
          [&](auto v) { sums[set][r][v] = multiply_add(value, weights[v], sums[set][r][v], Operand{}); });
    });
    a += a_step;
    w += w_step;
  };
  int64_t k = 0;
  for (; k + SETS <= depth; k += SETS) unrolled<SETS>(step);
  for (; k < depth; ++k) step(std::integral_constant<int, 0>{});
  unrolled<ROWS>([&](auto r) {
    unrolled<WIDTH>([&](auto v) {
      Vec total = sums[0][r][v];
      if constexpr (SETS == 2) total = add(total, sums[1][r][v]);
      total = add(total, load(init + r * init_stride + v * LANES));
      store(c + r * c_stride + v * LANES, total);
    });
  });
}

template <class Operand, int WIDTH, int... ROWS>
void tile_of_rows(int64_t rows, int64_t depth, const Product<Operand>& product, const Operand* w, bool back,
                  std::integer_sequence<int, ROWS...>) {
  using Tile = void (*)(int64_t, Product<Operand>, const Operand*, bool);
  static constexpr Tile TILES[] = {tile<Operand, ROWS + 1, WIDTH>...};
  TILES[rows - 1](depth, product, w, back);
}

template <class Operand, int SHAPE>
void multiply_panels(int64_t rows, const Product<Operand>& product, const Packed<Operand>& weights,
                     int64_t turn) {
  constexpr PanelShape shape = PANEL_SHAPES[SHAPE];
  constexpr int64_t panel_columns = shape.width * LANES;
  const int64_t panels = weights.columns / panel_columns;
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t column = (turn % 2 ? panels - 1 - i : i) * panel_columns;
    const Operand* panel = weights.cells + column * weights.depth * PER_CELL<Operand>;
    for (int64_t row = 0; row < rows; row += shape.rows) {
      const Product<Operand> part{product.a + row * product.a_stride,
                                  product.a_stride,
                                  product.init + row * product.init_stride + column,
                                  product.init_stride,
                                  product.c + row * product.c_stride + column,
                                  product.c_stride};
      tile_of_rows<Operand, shape.width>(std::min<int64_t>(shape.rows, rows - row), weights.depth, part,
                                         panel, rows == 1 && turn % 2,
                                         std::make_integer_sequence<int, shape.rows>{});
    }
  }
}

// ------------------------------------------------------------------------------ packing

// LANES cells of a row from step k on, zero beyond the depth.
template <class T>
Vec cells_of_row(const T* row, int64_t k, int64_t depth, float) {
  return k + LANES <= depth ? load(row + k) : load(row + k, first_lanes(std::max<int64_t>(depth - k, 0)));
}
#if defined(__AVX512BF16__)
Vec cells_of_row(const bfloat16* row, int64_t k, int64_t depth, bfloat16) {
  return load_pairs(row + k, std::max<int64_t>(depth - k, 0));
}
#endif

// LANES cells from `p` on, of one row, or of two interleaved; zero beyond `count`, and where there is no second row.
template <class T>
Vec cells_of_rows(const T* row, const T*, int64_t count, float) {
  return count >= LANES ? load(row) : load(row, first_lanes(std::max<int64_t>(count, 0)));
}
#if defined(__AVX512BF16__)
Vec cells_of_rows(const bfloat16* row, const bfloat16* next, int64_t count, bfloat16) {
  const Mask columns = first_lanes(std::max<int64_t>(count, 0));
  return load_pairs(row, columns, next ? next : row, next ? columns : Mask(0));
}
#endif

}  // namespace

template <class Operand>
void multiply(int64_t rows, const Product<Operand>& product, const Packed<Operand>& weights, int64_t turn) {
  if constexpr (IN_TILES<Operand>)
    if (weights.width == TILE_WIDTH) return multiply_in_tiles(rows, product, weights, turn);
  unrolled<std::size(PANEL_SHAPES)>([&](auto shape) {
    if (weights.width == PANEL_SHAPES[shape].width)
      multiply_panels<Operand, shape>(rows, product, weights, turn);
  });
}

template <class T, class Operand>
void pack_rows_as_columns(Operand* cells, int width, int64_t depth, int64_t at, const T* source,
                          int64_t stride, int64_t count) {
  constexpr int64_t CELL = PER_CELL<Operand>;
  const int64_t panel_columns = int64_t(width) * LANES;
  const int64_t depth_cells = Packed<Operand>::padded_depth(depth) / CELL;
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t column = at + first, rows = std::min<int64_t>(LANES, count - first);
    const int64_t panel = column / panel_columns, within = column % panel_columns;
    Operand* to = cells + (panel * panel_columns * depth_cells + within) * CELL;
    for (int64_t k = 0; k < depth_cells; k += LANES) {
      Vec block[LANES];
      unrolled<LANES>([&](auto row) {
        const T* from = source + (first + row) * stride;
        block[row] = row < rows ? cells_of_row(from, k * CELL, depth, Operand{}) : zero();
      });
      transpose(block);
      for (int64_t step = 0; step < std::min<int64_t>(LANES, depth_cells - k); ++step)
        store(reinterpret_cast<float*>(to + (k + step) * panel_columns * CELL), block[step]);
    }
  }
}

template <class T, class Operand>
void pack_panel(Operand* cells, int width, int64_t depth, int64_t first, const T* source, int64_t stride,
                int64_t count) {
  float* to = reinterpret_cast<float*>(cells);
  const auto row = [&](int64_t k) { return source + (k + first) % depth * stride; };
  const int64_t panel = int64_t(width) * LANES, padded = Packed<Operand>::padded_depth(depth);
  const int64_t real = round_up(depth, PER_CELL<Operand>);
  std::fill(to + real / PER_CELL<Operand> * panel, to + padded / PER_CELL<Operand> * panel, 0.0f);
  for (int64_t k = 0; k < depth; k += PER_CELL<Operand>) {
    const T* next = k + 1 < depth ? row(k + 1) : nullptr;
    for (int64_t column = 0; column < panel; column += LANES, to += LANES)
      store(to, cells_of_rows(row(k) + column, next ? next + column : nullptr, count - column, Operand{}));
  }
}

// ------------------------------------------------------------------------------ unpacked

namespace {

// Four columns share the loads of one row of x.
template <class X, class T>
void dot_columns(const X* x, const T* w, int64_t depth, int64_t columns, const float* bias, float* y) {
  Vec sums[4] = {zero(), zero(), zero(), zero()}, more[4] = {zero(), zero(), zero(), zero()};
  const T* rows[4];
  unrolled<4>([&](auto c) { rows[c] = w + std::min<int64_t>(c, columns - 1) * depth; });
  int64_t k = 0;
  for (; k + 2 * LANES <= depth; k += 2 * LANES) {
    const Vec a = load(x + k), b = load(x + k + LANES);
    unrolled<4>([&](auto c) {
      sums[c] = fma(a, load(rows[c] + k), sums[c]);
      more[c] = fma(b, load(rows[c] + k + LANES), more[c]);
    });
  }
  for (; k < depth; k += LANES) {
    const Mask mask = first_lanes(depth - k);
    const Vec a = load(x + k, mask);
    unrolled<4>([&](auto c) { sums[c] = fma(a, load(rows[c] + k, mask), sums[c]); });
  }
  unrolled<4>([&](auto c) {
    if (c < columns) y[c] = sum(add(sums[c], more[c])) + bias[c];
  });
}

}  // namespace

template <class X, class T>
void multiply_unpacked(int64_t rows, const X* x, int64_t x_stride, const T* w, int64_t depth,
                       const float* bias, int64_t count, float* y, int64_t y_stride) {
  for (int64_t column = 0; column < count; column += 4)
    for (int64_t row = 0; row < rows; ++row)
      dot_columns(x + row * x_stride, w + column * depth, depth, std::min<int64_t>(4, count - column),
                  bias + column, y + row * y_stride + column);
}

template <class T, class C>
void multiply_unpacked_columns(int64_t rows, const T* a, int64_t a_stride, const T* w, int64_t w_stride,
                               int64_t depth, int64_t first, int64_t count, bool accumulate, C* c,
                               int64_t c_stride) {
  constexpr int VECTORS = 4;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < count; column += VECTORS * LANES) {
      Mask masks[VECTORS];
      Vec sums[VECTORS];
      unrolled<VECTORS>([&](auto v) {
        masks[v] = first_lanes(std::max<int64_t>(0, count - column - v * LANES));
        sums[v] = zero();
      });
      for (int64_t k = 0; k < depth; ++k) {
        const Vec value = broadcast(to_float(a[row * a_stride + k]));
        const int64_t from = k + first < depth ? k + first : k + first - depth;
        const T* weights = w + from * w_stride + column;
        unrolled<VECTORS>(
            [&](auto v) { sums[v] = fma(value, load(weights + v * LANES, masks[v]), sums[v]); });
      }
      unrolled<VECTORS>([&](auto v) {
        C* to = c + row * c_stride + column + v * LANES;
        store(to, accumulate ? add(sums[v], load(to, masks[v])) : sums[v], masks[v]);
      });
    }
}

template <class T>
void outer_products(int64_t rows, const T* a, int64_t a_stride, int64_t m, const T* b, int64_t b_stride,
                    int64_t n, T* c) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; j += LANES) {
      const Mask mask = first_lanes(n - j);
      Vec sum = zero();
      for (int64_t r = 0; r < rows; ++r)
        sum = fma(broadcast(to_float(a[r * a_stride + i])), load(b + r * b_stride + j, mask), sum);
      store(c + i * n + j, sum, mask);
    }
}

#define INSTANTIATE_UNPACKED(X, T)                                                                   \
  template void multiply_unpacked<X, T>(int64_t, const X*, int64_t, const T*, int64_t, const float*, \
                                        int64_t, float*, int64_t);
#define INSTANTIATE_OPERAND(Operand) \
  template void multiply<Operand>(int64_t, const Product<Operand>&, const Packed<Operand>&, int64_t);
#define INSTANTIATE(T)                                                                                  \
  template void pack_rows_as_columns<T, operand_of<T>>(operand_of<T>*, int, int64_t, int64_t, const T*, \
                                                       int64_t, int64_t);                               \
  template void pack_panel<T, operand_of<T>>(operand_of<T>*, int, int64_t, int64_t, const T*, int64_t,  \
                                             int64_t);                                                  \
  INSTANTIATE_UNPACKED(T, T)                                                                            \
  template void multiply_unpacked_columns<T, T>(int64_t, const T*, int64_t, const T*, int64_t, int64_t, \
                                                int64_t, int64_t, bool, T*, int64_t);                   \
  template void outer_products<T>(int64_t, const T*, int64_t, int64_t, const T*, int64_t, int64_t, T*);
INSTANTIATE_OPERAND(float)
#if defined(__AVX512BF16__)
INSTANTIATE_OPERAND(bfloat16)
#endif
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)
INSTANTIATE_UNPACKED(float, float16)
template void multiply_unpacked_columns<bfloat16, float>(int64_t, const bfloat16*, int64_t, const bfloat16*,
                                                         int64_t, int64_t, int64_t, int64_t, bool, float*,
                                                         int64_t);
template void multiply_unpacked_columns<float16, float>(int64_t, const float16*, int64_t, const float16*,
                                                        int64_t, int64_t, int64_t, int64_t, bool, float*,
                                                        int64_t);
#if !defined(__AVX512BF16__)
INSTANTIATE_UNPACKED(float, bfloat16)
#endif

}  // namespace pyarch

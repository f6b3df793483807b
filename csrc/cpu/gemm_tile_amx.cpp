// The micro-kernel in tile registers; see gemm_tile.h and tile_registers.h.
//
// Registers 0 to 3 hold the sums of up to two squares of rows by two of columns. They begin with what the sum is added
// to, and go straight to where it is kept, where that is whole squares of float32; else both go through a block.
#if defined(__AMX_BF16__)

#include "gemm_tile.h"

namespace pyarch {
namespace {

constexpr int64_t FLOAT = sizeof(float), PANEL_BYTES = PANEL * FLOAT, SQUARE_BYTES = TILE_STEPS * FLOAT;

// Where sums are read or written; a pitch of 0 reads the same row for all.
struct Sums {
  float* first;
  int64_t pitch;  // in floats
};

template <int SQUARES>
ALWAYS_INLINE void load_sums(const Sums& from) {
  const int64_t bytes = from.pitch * FLOAT;
  memory_is_touched();
  _tile_loadd(0, from.first, bytes);
  _tile_loadd(1, from.first + LANES, bytes);
  if constexpr (SQUARES == 2) {
    const float* const second = from.first + MOST_TILE_ROWS * from.pitch;
    _tile_loadd(2, second, bytes);
    _tile_loadd(3, second + LANES, bytes);
  }
}

template <int SQUARES>
ALWAYS_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (SQUARES == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <int SQUARES>
ALWAYS_INLINE void store_sums(const Sums& to) {
  const int64_t bytes = to.pitch * FLOAT;
  _tile_stored(0, to.first, bytes);
  _tile_stored(1, to.first + LANES, bytes);
  if constexpr (SQUARES == 2) {
    float* const second = to.first + MOST_TILE_ROWS * to.pitch;
    _tile_stored(2, second, bytes);
    _tile_stored(3, second + LANES, bytes);
  }
  memory_is_touched();
}

template <int SQUARES>
ALWAYS_INLINE void multiply_squares(const float* a, const float* b, int64_t steps) {
  memory_is_touched();
  for (int64_t step = 0; step < steps; step += TILE_STEPS, a += 2 * SQUARE, b += TILE_STEPS * PANEL) {
    _tile_loadd(6, b, PANEL_BYTES);
    _tile_loadd(4, a, SQUARE_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + LANES, PANEL_BYTES);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (SQUARES == 2) {
      _tile_loadd(5, a + SQUARE, SQUARE_BYTES);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// Calls body(row, half, mask) for each vector of the sums.
template <class Body>
ALWAYS_INLINE void each_vector(int64_t rows, int64_t columns, Body&& body) {
  const Mask masks[2] = {first_lanes(columns), first_lanes(columns > LANES ? columns - LANES : 0)};
  for (int64_t row = 0; row < rows; ++row)
    for (int half = 0; half < 2; ++half) body(row, half * LANES, masks[half]);
}

template <int SQUARES, class Out>
__attribute__((noinline)) void multiply_strip(int64_t rows, const Tile<Out>& tile) {
  alignas(64) float block[SQUARES * MOST_TILE_ROWS * PANEL];
  const Target<Out> c = tile.c;
  const bool whole_rows = rows == SQUARES * MOST_TILE_ROWS, whole_columns = tile.columns == PANEL;
  const bool is_float = std::is_same_v<Out, float>, in_place = is_float && whole_rows && whole_columns;
  Sums sums_of_c{};
  if constexpr (std::is_same_v<Out, float>) sums_of_c = {c.data, c.row_stride};

  if (!tile.bias && !tile.sums && !tile.accumulate) {
    zero_sums<SQUARES>();
  } else if (tile.bias && whole_columns && !tile.sums && !tile.accumulate) {
    load_sums<SQUARES>({const_cast<float*>(tile.bias), 0});
  } else if (tile.accumulate && in_place && !tile.bias && !tile.sums) {
    load_sums<SQUARES>(sums_of_c);
  } else {
    each_vector(rows, tile.columns, [&](int64_t row, int64_t column, Mask mask) INLINED {
      Vec sum = tile.bias ? load(tile.bias + column, mask) : zero();
      if (tile.sums) sum = add(sum, load(tile.sums + row * PANEL + column, mask));
      if (tile.accumulate) sum = add(sum, load(c.data + row * c.row_stride + column, mask));
      store(block + row * PANEL + column, sum);
    });
    load_sums<SQUARES>({block, PANEL});
  }
  multiply_squares<SQUARES>(tile.a, tile.b, tile.steps);
  if (tile.keep_sums && whole_rows) return store_sums<SQUARES>({tile.keep_sums, PANEL});
  if (!tile.keep_sums && in_place) return store_sums<SQUARES>(sums_of_c);
  store_sums<SQUARES>({block, PANEL});
  each_vector(rows, tile.columns, [&](int64_t row, int64_t column, Mask mask) INLINED {
    const Vec sum = load(block + row * PANEL + column);
    if (tile.keep_sums)
      store(tile.keep_sums + row * PANEL + column, sum);
    else
      store(c.data + row * c.row_stride + column, sum, mask);
  });
}

template <class Out>
void multiply_strip_of(int64_t rows, const Tile<Out>& tile) {
  if (rows > MOST_TILE_ROWS)
    multiply_strip<2>(rows, tile);
  else
    multiply_strip<1>(rows, tile);
}

}  // namespace

template <>
void multiply_tile<Pair>(int64_t rows, const Tile<float>& tile) {
  multiply_strip_of(rows, tile);
}
template <>
void multiply_tile<Pair>(int64_t rows, const Tile<bfloat16>& tile) {
  multiply_strip_of(rows, tile);
}

}  // namespace pyarch

#endif

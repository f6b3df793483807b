// The micro-kernel; see gemm_tile.h.
#include "gemm_tile.h"

#include <array>

namespace pyarch {
namespace {

// A row of the tile as C has it: whole, or the columns left at the right edge.
struct WholePanel {
  template <class T>
  ALWAYS_INLINE Vec load(const T* row, int half) const {
    return pyarch::load(row + half * LANES);
  }
  template <class T>
  ALWAYS_INLINE void store(T* row, int half, Vec value) const {
    pyarch::store(row + half * LANES, value);
  }
};
struct PanelEdge {
  Mask masks[2];

  explicit PanelEdge(int64_t columns)
      : masks{first_lanes(columns), first_lanes(columns > LANES ? columns - LANES : 0)} {}
  template <class T>
  ALWAYS_INLINE Vec load(const T* row, int half) const {
    return pyarch::load(row + half * LANES, masks[half]);
  }
  template <class T>
  ALWAYS_INLINE void store(T* row, int half, Vec value) const {
    pyarch::store(row + half * LANES, value, masks[half]);
  }
};

// Replaces every value of the tile by value_of(value, row, half).
template <int R, class Body>
ALWAYS_INLINE void each(Vec (&values)[R][2], Body&& value_of) {
  unrolled<R>([&](auto row) INLINED {
    unrolled<2>([&](auto half) INLINED { values[row][half] = value_of(values[row][half], row, half); });
  });
}

template <int R, class Out, class Columns>
ALWAYS_INLINE void finish(Vec (&values)[R][2], const Tile<Out>& tile, const Columns& columns) {
  const Target<Out> c = tile.c;
  if (const float* bias = tile.bias) {
    const Vec both[2] = {columns.load(bias, 0), columns.load(bias, 1)};
    each<R>(values, [&](Vec value, int, int half) INLINED { return add(value, both[half]); });
  }
  if (const float* sums = tile.sums)
    each<R>(values, [&](Vec value, int row, int half)
                        INLINED { return add(value, load(sums + row * PANEL + half * LANES)); });
  if (tile.accumulate)
    each<R>(values, [&](Vec value, int row, int half)
                        INLINED { return add(value, columns.load(c.data + row * c.row_stride, half)); });
  if (float* sums = tile.keep_sums)
    each<R>(values, [&](Vec value, int row, int half) INLINED {
      store(sums + row * PANEL + half * LANES, value);
      return value;
    });
  else
    each<R>(values, [&](Vec value, int row, int half) INLINED {
      columns.store(c.data + row * c.row_stride, half, value);
      return value;
    });
}

// Where the tile's sum goes: it is written at the end, and may be read.
template <int R, class Out>
ALWAYS_INLINE void prefetch(const Tile<Out>& tile) {
  const auto prefetch_rows = [](auto* rows, int64_t row_stride) INLINED {
    unrolled<R>([&](auto row) INLINED {
      __builtin_prefetch(rows + row * row_stride, 1);
      __builtin_prefetch(rows + row * row_stride + PANEL - 1, 1);
    });
  };
  if (tile.keep_sums)
    prefetch_rows(tile.keep_sums, PANEL);
  else
    prefetch_rows(tile.c.data, tile.c.row_stride);
}

template <int R, class S, class Out>
__attribute__((noinline)) void multiply_rows(const Tile<Out>& tile) {
  Vec values[R][2];
  unrolled<R>([&](auto row) INLINED { values[row][0] = values[row][1] = zero(); });
  prefetch<R>(tile);
  const float *a = tile.a, *b = tile.b;
  for (int64_t step = 0; step < tile.steps; ++step, a += LANES, b += PANEL) {
    Vec b0 = load(b), b1 = load(b + LANES);
    IN_REGISTER(b0);
    IN_REGISTER(b1);
    unrolled<R>([&](auto row) INLINED {
      Vec one = broadcast(a[row]);
      IN_REGISTER(one);
      values[row][0] = S::multiply_add(one, b0, values[row][0]);
      values[row][1] = S::multiply_add(one, b1, values[row][1]);
    });
  }
  if (tile.columns == PANEL)
    finish<R>(values, tile, WholePanel{});
  else
    finish<R>(values, tile, PanelEdge(tile.columns));
}

}  // namespace

template <class S, class Out>
void multiply_tile(int64_t rows, const Tile<Out>& tile) {
  static constexpr auto BY_ROWS = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array{&multiply_rows<R + 1, S, Out>...};
  }(std::make_integer_sequence<int, ROWS>{});
  BY_ROWS[rows - 1](tile);
}

template void multiply_tile<Single>(int64_t, const Tile<float>&);
template void multiply_tile<Single>(int64_t, const Tile<bfloat16>&);
template void multiply_tile<Single>(int64_t, const Tile<float16>&);
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template void multiply_tile<Pair>(int64_t, const Tile<float>&);
template void multiply_tile<Pair>(int64_t, const Tile<bfloat16>&);
#endif

}  // namespace pyarch

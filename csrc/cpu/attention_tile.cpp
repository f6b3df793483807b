// The micro-kernels; see attention_tile.h.
#include "attention_tile.h"

#include <array>

namespace pyarch {
namespace {

template <class S, int64_t ROW, int64_t STEP, int R, int V>
ALWAYS_INLINE void multiply(const float* left, const float* right, int64_t steps, Vec (&sums)[R][V]) {
  unrolled<R>([&](auto row)
                  INLINED { unrolled<V>([&](auto column) INLINED { sums[row][column] = zero(); }); });
  for (int64_t step = 0; step < steps; ++step, left += STEP, right += PANEL) {
    Vec lanes[V];
    unrolled<V>([&](auto column) INLINED {
      Vec loaded = load(right + column * LANES);
      IN_REGISTER(loaded);
      lanes[column] = loaded;
    });
    unrolled<R>([&](auto row) INLINED {
      Vec one = broadcast(left[row * ROW]);
      IN_REGISTER(one);
      unrolled<V>([&](auto column) INLINED {
        sums[row][column] = S::multiply_add(one, lanes[column], sums[row][column]);
      });
    });
  }
}

template <class S, int R, int V>
__attribute__((noinline)) void score_rows(const ScoreTile& tile) {
  Vec scores[R][V];
  multiply<S, 1, LANES>(tile.queries, tile.keys, tile.steps, scores);
  unrolled<R>([&](auto row) INLINED {
    unrolled<V>([&](auto column)
                    INLINED { store(tile.scores + row * KEY_PITCH + column * LANES, scores[row][column]); });
  });
  if (float* const maxima = tile.maxima)
    unrolled<R>([&](auto row) INLINED {
      const Vec largest = larger_of(scores[row][0], scores[row][V - 1]);
      store(maxima + row * LANES, larger_of(load(maxima + row * LANES), largest));
    });
}

template <class S, int64_t ROW, int64_t STEP, int R, int V>
__attribute__((noinline)) void sum_rows(const SumTile& tile) {
  Vec sums[R][V];
  multiply<S, ROW, STEP>(tile.left, tile.right, tile.steps, sums);
  unrolled<R>([&](auto row) INLINED {
    float* const kept = tile.sums + row * tile.pitch;
    unrolled<V>([&](auto column) INLINED {
      Vec sum = sums[row][column];
      if (!tile.fresh) {
        const Vec before = load(kept + column * LANES);
        sum = tile.factors ? fma(before, broadcast(tile.factors[row]), sum) : add(before, sum);
      }
      store(kept + column * LANES, sum);
    });
  });
}

template <class S, int64_t ROW, int64_t STEP>
void sum_by_rows(int64_t rows, int64_t columns, const SumTile& tile) {
  static constexpr auto BY_ROWS = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array{&sum_rows<S, ROW, STEP, R + 1, 1>..., &sum_rows<S, ROW, STEP, R + 1, 2>...};
  }(std::make_integer_sequence<int, ROWS>{});
  BY_ROWS[rows - 1 + (columns > LANES ? ROWS : 0)](tile);
}

}  // namespace

template <class T>
void multiply_scores(int64_t rows, int64_t columns, const ScoreTile& tile) {
  static constexpr auto BY_ROWS = []<int... R>(std::integer_sequence<int, R...>) {
    return std::array{&score_rows<Step<T>, R + 1, 1>..., &score_rows<Step<T>, R + 1, 2>...};
  }(std::make_integer_sequence<int, ROWS>{});
  BY_ROWS[rows - 1 + (columns > LANES ? ROWS : 0)](tile);
}

template <class T>
void multiply_sums(int64_t rows, int64_t columns, const SumTile& tile) {
  sum_by_rows<Step<T>, KEY_PITCH, 1>(rows, columns, tile);
}

template <class T>
void multiply_sums_across(int64_t rows, int64_t columns, const SumTile& tile) {
  sum_by_rows<Step<T>, 1, KEY_PITCH>(rows, columns, tile);
}

#define PYARCH_ATTENTION_TILES(T)                                       \
  template void multiply_scores<T>(int64_t, int64_t, const ScoreTile&); \
  template void multiply_sums<T>(int64_t, int64_t, const SumTile&);     \
  template void multiply_sums_across<T>(int64_t, int64_t, const SumTile&);
PYARCH_ATTENTION_TILES(float)
PYARCH_ATTENTION_TILES(float16)
#if !defined(__AMX_BF16__)
PYARCH_ATTENTION_TILES(bfloat16)
#endif

}  // namespace pyarch

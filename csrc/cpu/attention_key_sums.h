// Where the gradient of keys or values gathers: for every key a sum over queries, in float32.
//
//   sums[key, c] += sum over queries of scores[query, key] * rows[query, c]
#pragma once

#include <cstring>

#include "attention_operands.h"
#include "attention_tasks.h"

namespace pyarch {

#if defined(__AMX_BF16__)

// LANES columns at a time as rows of steps over the rows: what stands on the left in tile registers.
template <class T>
void pack_upright(const Rows<T>& rows, int64_t count, float* packed) {
  const int64_t steps = steps_of<T>(count);
  constexpr int64_t AT_ONCE = LANES * Step<T>::ELEMENTS;
  alignas(64) float square[LANES * LANES];
  for (int64_t column = 0; column < rows.columns; column += LANES, packed += LANES * steps)
    for (int64_t row = 0; row < count; row += AT_ONCE) {
      std::fill(square, square + LANES * LANES, 0.0f);
      pack<T>({rows.from(row).data + column * rows.column_stride, rows.column_stride, rows.row_stride,
               rows.columns - column, std::min(AT_ONCE, count - row)},
              square, LANES);
      Vec lanes[LANES];
      unrolled<LANES>([&](auto i) { lanes[i] = load(square + i * LANES); });
      transpose(lanes);
      unrolled<LANES>([&](auto i) { store(packed + i * steps + row / Step<T>::ELEMENTS, lanes[i]); });
    }
}

#endif

template <class T>
class KeySums {
 public:
  KeySums(int64_t keys, int64_t columns) : keys_(keys), columns_(columns) {}

  int64_t floats() const {
    return IN_TILES<T> ? round_up(columns_, LANES) * upright_pitch() : keys_ * round_up(columns_, PANEL);
  }
  // Of a chunk's rows, packed.
  int64_t operand_floats() const {
    return IN_TILES<T> ? round_up(columns_, LANES) * steps_of<T>(CHUNK<T>)
                       : column_panels_floats<T>(CHUNK<T>, columns_);
  }

  void clear(float* sums, Span keys) const {
    if constexpr (IN_TILES<T>) {
      for (int64_t c = 0; c < round_up(columns_, LANES); ++c)
        std::fill_n(sums + c * upright_pitch() + keys.begin, round_up(keys.size(), PANEL), 0.0f);
    } else {
      const int64_t pitch = round_up(columns_, PANEL);
      std::fill_n(sums + keys.begin * pitch, keys.size() * pitch, 0.0f);
    }
  }

  void pack_chunk(const Rows<T>& rows, int64_t count, float* packed) const {
#if defined(__AMX_BF16__)
    if constexpr (IN_TILES<T>) return pack_upright(rows, count, packed);
#endif
    pack_column_panels(rows, count, packed);
  }

  // A tile of at most STRIP (in tile registers PANEL) keys meets rows [begin, end) of a chunk of `count`; `scores`
  // begin with the tile's first key.
  static constexpr int64_t TILE = IN_TILES<T> ? PANEL : ROWS;
  void add(float* sums, Span keys, Span rows, int64_t count, const float* scores, const float* packed) const {
    constexpr int64_t E = Step<T>::ELEMENTS;
    const int64_t first = rows.begin / E, steps = steps_of<T>(rows.size()), all_steps = steps_of<T>(count);
#if defined(__AMX_BF16__)
    if constexpr (IN_TILES<T>) {
      const int64_t pitch = upright_pitch();
      for (int64_t c = 0; c < columns_; c += LANES)
        multiply_sums_upright({packed + c * all_steps + first, all_steps, scores + first * KEY_PITCH, steps,
                               sums + c * pitch + keys.begin, pitch});
      return;
    }
#endif
    const int64_t pitch = round_up(columns_, PANEL);
    for (int64_t c = 0; c < columns_; c += PANEL)
      multiply_sums_across<T>(keys.size(), columns_ - c,
                              {scores + first * KEY_PITCH, packed + (c / PANEL * all_steps + first) * PANEL,
                               steps, sums + keys.begin * pitch + c, pitch, nullptr, false});
  }

  void write(const float* sums, Span keys, T* to, int64_t row_stride, float scale) const {
#if defined(__AMX_BF16__)
    if constexpr (IN_TILES<T>) {
      for (int64_t key = keys.begin; key < keys.end; key += LANES)
        for (int64_t c = 0; c < columns_; c += LANES) {
          Vec lanes[LANES];
          unrolled<LANES>([&](auto i) { lanes[i] = load(sums + (c + i) * upright_pitch() + key); });
          transpose(lanes);
          alignas(64) float square[LANES * LANES];
          unrolled<LANES>([&](auto i) { store(square + i * LANES, lanes[i]); });
          for (int64_t i = 0; i < std::min<int64_t>(LANES, keys.end - key); ++i)
            write_row(to + (key + i) * row_stride + c, square + i * LANES,
                      std::min<int64_t>(LANES, columns_ - c), broadcast(scale));
        }
      return;
    }
#endif
    const int64_t pitch = round_up(columns_, PANEL);
    for (int64_t key = keys.begin; key < keys.end; ++key)
      write_row(to + key * row_stride, sums + key * pitch, columns_, broadcast(scale));
  }

 private:
  // An odd number of cache lines: rows a power of two apart would drive each other out of the cache.
  int64_t upright_pitch() const { return round_up(keys_, PANEL) + LANES; }

  const int64_t keys_, columns_;
};

}  // namespace pyarch

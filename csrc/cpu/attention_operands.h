// What attention multiplies, packed: rows of a head as lanes (queries of a strip, keys of a panel) over the elements of
// a head, or its elements as lanes over the rows.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"
#include "attention_sight.h"
#include "attention_tile.h"

namespace pyarch {

// The rows of one head, of any strides.
template <class T>
struct Rows {
  const T* data;
  int64_t row_stride, column_stride, columns;

  static Rows of(const Heads<const T>& heads, int64_t b, int64_t h, int64_t columns) {
    return {heads.at(b, h), heads.row_stride, heads.column_stride, columns};
  }
  Rows from(int64_t row) const { return {data + row * row_stride, row_stride, column_stride, columns}; }
};

// Copies rows without gaps; those that are not kept become zeros.
template <class T>
Rows<T> copy_kept(const Rows<T>& rows, int64_t count, const uint8_t* kept, T* copy) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t column = 0; column < rows.columns; ++column)
      copy[row * rows.columns + column] =
          kept[row] ? rows.data[row * rows.row_stride + column * rows.column_stride] : T{};
  return {copy, rows.columns, 1, rows.columns};
}

// A strip of at most STRIP rows over the columns: one vector of rows a step; in tile registers, rows of steps.
template <class T>
int64_t strip_floats(int64_t columns) {
  return steps_of<T>(columns) * LANES;
}
template <class T>
void pack_strip(const Rows<T>& rows, int64_t count, float* packed) {
  if constexpr (IN_TILES<T>) {
    const int64_t steps = steps_of<T>(rows.columns);
    for (int64_t row = 0; row < count; ++row) {
      T* const copy = reinterpret_cast<T*>(packed + row * steps);
      if (rows.column_stride == 1) {
        for (int64_t step = 0; step < steps; step += LANES)
          store(packed + row * steps + step,
                Step<T>::load_along(rows.from(row).data + 2 * step,
                                    std::max<int64_t>(0, rows.columns - 2 * step)));
        continue;
      }
      for (int64_t column = 0; column < rows.columns; ++column)
        copy[column] = rows.data[row * rows.row_stride + column * rows.column_stride];
      std::fill(copy + rows.columns, copy + 2 * steps, T{});
    }
  } else {
    pack<T>({rows.data, rows.row_stride, rows.column_stride, count, rows.columns}, packed, LANES);
  }
}

// Writes zeros for steps that only make their number even for tile registers.
template <class T>
void clear_steps(int64_t elements, float* packed) {
  const int64_t real = ceil_div(elements, Step<T>::ELEMENTS);
  std::fill(packed + real * PANEL, packed + steps_of<T>(elements) * PANEL, 0.0f);
}

// Panels of PANEL rows each, over the columns.
template <class T>
int64_t row_panel_floats(int64_t columns) {
  return steps_of<T>(columns) * PANEL;
}
template <class T>
int64_t row_panels_floats(int64_t rows, int64_t columns) {
  return ceil_div(rows, PANEL) * row_panel_floats<T>(columns);
}
template <class T>
void pack_row_panels(const Rows<T>& rows, int64_t count, float* packed) {
  for (int64_t row = 0; row < count; row += LANES) {
    float* const panel = packed + row / PANEL * row_panel_floats<T>(rows.columns);
    if (row % PANEL == 0) clear_steps<T>(rows.columns, panel);
    pack<T>({rows.from(row).data, rows.row_stride, rows.column_stride, count - row, rows.columns},
            panel + row % PANEL, PANEL);
  }
}

// Panels of PANEL columns each, over the rows. All panels take a few rows at a time, so that memory is read in long
// runs.
template <class T>
int64_t column_panel_floats(int64_t rows) {
  return steps_of<T>(rows) * PANEL;
}
template <class T>
int64_t column_panels_floats(int64_t rows, int64_t columns) {
  return ceil_div(columns, PANEL) * column_panel_floats<T>(rows);
}
template <class T>
void pack_column_panels(const Rows<T>& rows, int64_t count, float* packed) {
  constexpr int64_t AT_ONCE = 16 * Step<T>::ELEMENTS;
  const int64_t panel_floats = column_panel_floats<T>(count);
  for (int64_t panel = 0; panel * PANEL < rows.columns; ++panel)
    clear_steps<T>(count, packed + panel * panel_floats);
  for (int64_t row = 0; row < count; row += AT_ONCE)
    for (int64_t column = 0; column < rows.columns; column += LANES)
      pack<T>({rows.from(row).data + column * rows.column_stride, rows.column_stride, rows.row_stride,
               rows.columns - column, std::min(AT_ONCE, count - row)},
              packed + column / PANEL * panel_floats + row / Step<T>::ELEMENTS * PANEL + column % PANEL,
              PANEL);
}

// A row of sums, scaled and rounded.
template <class T>
void write_row(T* to, const float* sums, int64_t columns, Vec scale) {
  for (int64_t c = 0; c < columns; c += LANES) {
    const Vec value = mul(load(sums + c), scale);
    if (columns - c >= LANES)
      store(to + c, value);
    else
      store(to + c, value, first_lanes(columns - c));
  }
}

}  // namespace pyarch

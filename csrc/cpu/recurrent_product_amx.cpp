// The product of one time step in tile registers; see recurrent_product.h and tile_registers.h.
//
// Registers 0 to 3 hold the sums, which begin with `init`: of one strip of rows by four panels, or of two strips by two.
// Weights then come from the caches once for two strips.
#if defined(__AMX_BF16__)

#include "recurrent_product.h"

namespace pyarch {
namespace {

constexpr int64_t FLOAT = sizeof(float), CELL = PER_CELL<bfloat16>, WEIGHT_BYTES = TILE_WIDTH * LANES * FLOAT;
constexpr int64_t A_ELEMENTS = TILE_STEPS * CELL, WEIGHT_ELEMENTS = TILE_STEPS * TILE_WIDTH * LANES * CELL;
static_assert(TILE_WIDTH == 1);

// The sums of so many strips of rows by so many panels.
struct Block {
  const bfloat16 *a, *next_a;  // of two strips
  int64_t a_bytes;             // a row
  const bfloat16* weights;
  int64_t panel;  // elements
  int64_t depth;  // cells
  const float* init;
  int64_t init_stride;
  float* c;
  int64_t c_stride;
  int64_t strip_rows;
};

template <int STRIPS, int PANELS>
ALWAYS_INLINE void load_sums(const Block& block) {
  const int64_t bytes = block.init_stride * FLOAT;
  _tile_loadd(0, block.init, bytes);
  if constexpr (PANELS > 1) _tile_loadd(1, block.init + LANES, bytes);
  if constexpr (STRIPS == 2) {
    const float* const next = block.init + block.strip_rows * block.init_stride;
    _tile_loadd(2, next, bytes);
    if constexpr (PANELS > 1) _tile_loadd(3, next + LANES, bytes);
  } else {
    if constexpr (PANELS > 2) _tile_loadd(2, block.init + 2 * LANES, bytes);
    if constexpr (PANELS > 3) _tile_loadd(3, block.init + 3 * LANES, bytes);
  }
}

template <int STRIPS, int PANELS>
ALWAYS_INLINE void store_sums(const Block& block) {
  const int64_t bytes = block.c_stride * FLOAT;
  _tile_stored(0, block.c, bytes);
  if constexpr (PANELS > 1) _tile_stored(1, block.c + LANES, bytes);
  if constexpr (STRIPS == 2) {
    float* const next = block.c + block.strip_rows * block.c_stride;
    _tile_stored(2, next, bytes);
    if constexpr (PANELS > 1) _tile_stored(3, next + LANES, bytes);
  } else {
    if constexpr (PANELS > 2) _tile_stored(2, block.c + 2 * LANES, bytes);
    if constexpr (PANELS > 3) _tile_stored(3, block.c + 3 * LANES, bytes);
  }
}

template <int STRIPS, int PANELS>
ALWAYS_INLINE void multiply_block(const Block& block) {
  static_assert(STRIPS * PANELS <= 4);
  const bfloat16 *a = block.a, *next_a = block.next_a, *weights = block.weights;
  memory_is_touched();
  load_sums<STRIPS, PANELS>(block);
  for (int64_t k = 0; k < block.depth; k += TILE_STEPS) {
    _tile_loadd(4, a, block.a_bytes);
    _tile_loadd(6, weights, WEIGHT_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (PANELS > 1) {
      _tile_loadd(7, weights + block.panel, WEIGHT_BYTES);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (STRIPS == 2) {
      _tile_loadd(5, next_a, block.a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (PANELS > 1) _tile_dpbf16ps(3, 5, 7);
      next_a += A_ELEMENTS;
    } else {
      if constexpr (PANELS > 2) {
        _tile_loadd(6, weights + 2 * block.panel, WEIGHT_BYTES);
        _tile_dpbf16ps(2, 4, 6);
      }
      if constexpr (PANELS > 3) {
        _tile_loadd(7, weights + 3 * block.panel, WEIGHT_BYTES);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
    a += A_ELEMENTS;
    weights += WEIGHT_ELEMENTS;
  }
  store_sums<STRIPS, PANELS>(block);
  memory_is_touched();
}

// Rows that do not fill their strips: the sums go through a block of memory that all strips' rows have room in.
template <int STRIPS, int PANELS>
__attribute__((noinline)) void multiply_part(const Block& block, int64_t rows) {
  constexpr int64_t PITCH = PANELS * LANES;
  alignas(64) float sums[STRIPS * MOST_TILE_ROWS * PITCH];
  const auto each_vector = [&](auto&& body) INLINED {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < PITCH; column += LANES) body(row, column);
  };
  each_vector([&](int64_t row, int64_t column) INLINED {
    store(sums + row * PITCH + column, load(block.init + row * block.init_stride + column));
  });
  Block within = block;
  within.init = within.c = sums;
  within.init_stride = within.c_stride = PITCH;
  multiply_block<STRIPS, PANELS>(within);
  each_vector([&](int64_t row, int64_t column) INLINED {
    store(block.c + row * block.c_stride + column, load(sums + row * PITCH + column));
  });
}

template <int STRIPS, int PANELS>
void multiply_rows(const Block& block, int64_t rows) {
  if (rows < STRIPS * block.strip_rows)
    multiply_part<STRIPS, PANELS>(block, rows);
  else
    multiply_block<STRIPS, PANELS>(block);
}

// All rows of some panels.
template <int STRIPS, int PANELS>
void multiply_panels(int64_t rows, const Product<bfloat16>& product, const Packed<bfloat16>& weights,
                     int64_t column) {
  const int64_t strip = weights.tile_rows, panel = weights.depth * LANES * CELL;
  for (int64_t row = 0; row < rows; row += STRIPS * strip) {
    const bfloat16* const a = product.a + row * product.a_stride;
    const Block block{a,
                      a + strip * product.a_stride,
                      product.a_stride * int64_t(sizeof(bfloat16)),
                      weights.cells + column / LANES * panel,
                      panel,
                      weights.depth,
                      product.init + row * product.init_stride + column,
                      product.init_stride,
                      product.c + row * product.c_stride + column,
                      product.c_stride,
                      strip};
    if (STRIPS == 2 && rows - row <= strip)
      multiply_rows<1, PANELS>(block, rows - row);
    else
      multiply_rows<STRIPS, PANELS>(block, rows - row);
  }
}

// Groups of panels, those that are left over one by one.
template <int STRIPS, int PANELS>
void multiply_all(int64_t rows, const Product<bfloat16>& product, const Packed<bfloat16>& weights,
                  int64_t turn) {
  const int64_t panels = weights.columns / LANES, groups = panels / PANELS, tasks = groups + panels % PANELS;
  for (int64_t i = 0; i < tasks; ++i) {
    const int64_t task = turn % 2 ? tasks - 1 - i : i;
    if (task < groups)
      multiply_panels<STRIPS, PANELS>(rows, product, weights, task * PANELS * LANES);
    else
      multiply_panels<STRIPS, 1>(rows, product, weights, (groups * PANELS + task - groups) * LANES);
  }
}

}  // namespace

void multiply_in_tiles(int64_t rows, const Product<bfloat16>& product, const Packed<bfloat16>& weights,
                       int64_t turn) {
  if (rows <= weights.tile_rows)
    multiply_all<1, 4>(rows, product, weights, turn);
  else
    multiply_all<2, 2>(rows, product, weights, turn);
}

}  // namespace pyarch

#endif

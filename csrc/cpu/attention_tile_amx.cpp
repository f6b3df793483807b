// The micro-kernels in tile registers; see attention_tile.h.
#if defined(__AMX_BF16__)

#include "attention_tile.h"

namespace pyarch {
namespace {

constexpr int64_t PANEL_BYTES = PANEL * sizeof(float);

bool any_differs(Vec v, float value) { return _mm512_cmp_ps_mask(v, broadcast(value), _CMP_NEQ_UQ); }

// Registers 0 and 1 sum left * right for a panel's two halves.
ALWAYS_INLINE void multiply_panel(const float* left, int64_t left_bytes, const float* right,
                                  int64_t right_bytes, int64_t steps) {
  for (int64_t step = 0; step < steps; step += TILE_STEPS) {
    const float* const rows = right + step * right_bytes / int64_t(sizeof(float));
    _tile_loadd(2, left + step, left_bytes);
    _tile_loadd(3, rows, right_bytes);
    _tile_dpbf16ps(0, 2, 3);
    _tile_loadd(4, rows + LANES, right_bytes);
    _tile_dpbf16ps(1, 2, 4);
  }
}

__attribute__((noinline)) void multiply_into(const float* left, int64_t left_bytes, const float* right,
                                             int64_t right_bytes, int64_t steps, float* sums, int64_t pitch,
                                             bool fresh) {
  const int64_t sums_bytes = pitch * int64_t(sizeof(float));
  memory_is_touched();
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_loadd(0, sums, sums_bytes);
    _tile_loadd(1, sums + LANES, sums_bytes);
  }
  multiply_panel(left, left_bytes, right, right_bytes, steps);
  _tile_stored(0, sums, sums_bytes);
  _tile_stored(1, sums + LANES, sums_bytes);
  memory_is_touched();
}

}  // namespace

template <>
void multiply_scores<bfloat16>(int64_t, int64_t, const ScoreTile& tile) {
  multiply_into(tile.queries, tile.steps * int64_t(sizeof(float)), tile.keys, PANEL_BYTES, tile.steps,
                tile.scores, KEY_PITCH, true);
}

template <>
void multiply_sums<bfloat16>(int64_t rows, int64_t, const SumTile& tile) {
  if (tile.factors && !tile.fresh && any_differs(load(tile.factors), 1.0f))
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < PANEL; c += LANES) {
        float* const kept = tile.sums + r * tile.pitch + c;
        store(kept, mul(load(kept), broadcast(tile.factors[r])));
      }
  multiply_into(tile.left, KEY_PITCH * sizeof(float), tile.right, PANEL_BYTES, tile.steps, tile.sums,
                tile.pitch, tile.fresh);
}

void multiply_sums_upright(const UprightTile& tile) {
  multiply_into(tile.left, tile.left_pitch * int64_t(sizeof(float)), tile.right, KEY_PITCH * sizeof(float),
                tile.steps, tile.sums, tile.pitch, false);
}

}  // namespace pyarch

#endif

// The micro-kernels of attention: a strip of rows against a panel of columns, held in registers over a stretch of steps.
//
// Scores: a strip of queries by the keys of a panel, over the elements of a head. Sums: rows by a panel of columns, over
// keys or over queries; their left operand is what scores became. Right operands are packed as gemm_pack.h says: PANEL
// lanes a step. A step is one float32, or two bfloat16 where the instruction set multiplies them in pairs.
//
// Where it has tile registers (AMX), bfloat16 goes through them: 16 rows by 16 steps by 16 columns an instruction. A left
// operand then is rows of steps, and steps come in multiples of 16; a sum over queries is made the other way round, its
// columns by keys, because scores are there in pairs of queries and so can only stand on the right.
#pragma once

#include "gemm_tile.h"
#include "integers.h"
#include "tile_registers.h"

namespace pyarch {

// Rows of a strip.
template <class T>
constexpr int64_t STRIP = IN_TILES<T> ? LANES : ROWS;

// Scores of a strip are kept for a block of keys, a row after another.
constexpr int64_t KEY_BLOCK = REGISTERS == 32 ? 224 : 192;  // whole strips of ROWS and whole panels
constexpr int64_t KEY_PITCH = KEY_BLOCK + 16;
static_assert(KEY_BLOCK % ROWS == 0 && KEY_BLOCK % PANEL == 0);

// Steps over so many elements.
template <class T>
constexpr int64_t steps_of(int64_t elements) {
  constexpr int64_t together = IN_TILES<T> ? 16 : 1;
  return round_up(ceil_div(elements, Step<T>::ELEMENTS), together);
}

// scores[r * KEY_PITCH + c] = sum over steps, for whole vectors of the `columns` of PANEL that there are. `maxima`,
// LANES floats a row, become the largest score yet in each lane; they may be null, and in tile registers must.
struct ScoreTile {
  const float* queries;  // packed by pack_strip
  const float* keys;     // packed: PANEL keys a step
  int64_t steps;
  float* scores;
  float* maxima;
};
template <class T>
void multiply_scores(int64_t rows, int64_t columns, const ScoreTile& tile);

// sums[r * pitch + c] = (sums * factors[r]) + sum over steps. In tile registers a whole strip of sums is written.
struct SumTile {
  const float* left;
  const float* right;
  int64_t steps;
  float* sums;
  int64_t pitch;
  const float* factors;  // null: 1
  bool fresh;            // nothing was summed before
};

// The left operand is a strip's rows of a buffer of scores. `columns` of PANEL, of which whole vectors are summed.
template <class T>
void multiply_sums(int64_t rows, int64_t columns, const SumTile& tile);

// The left operand is columns of a buffer of scores, KEY_PITCH a step: rows of sums are keys.
template <class T>
void multiply_sums_across(int64_t rows, int64_t columns, const SumTile& tile);

#if defined(__AMX_BF16__)

// The same the other way round, added to what there is: sums[c * pitch + r] for LANES columns c and PANEL keys r. The
// left operand is LANES rows of steps; the right one columns of a buffer of scores.
struct UprightTile {
  const float* left;
  int64_t left_pitch;
  const float* right;
  int64_t steps;
  float* sums;
  int64_t pitch;
};
void multiply_sums_upright(const UprightTile& tile);

#endif

}  // namespace pyarch

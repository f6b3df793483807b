// Packed operands of a matrix product: what the micro-kernel reads, and how it is made.
//
// An operand is cut along m or n into groups of LANES lanes, and along k into steps of 32 bits: one float32, or two
// neighbouring bfloat16 where the instruction set multiplies them in pairs. Packed, a group is one vector a step,
// at a pitch, so that several groups can stand side by side. Elements beyond k are zero. In tile registers the left
// operand is squares instead: 16 rows of 16 steps, one after another.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "tile_registers.h"

namespace pyarch {

// One element a step, widened to float32.
struct Single {
  static constexpr int ELEMENTS = 1;

  static ALWAYS_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }

  // The steps of one lane; those of LANES lanes.
  template <class T>
  static ALWAYS_INLINE Vec load_along(const T* p, int64_t elements) {
    return elements >= LANES ? load(p) : load(p, first_lanes(elements));
  }
  template <class T>
  static ALWAYS_INLINE Vec load_across(const T* p, int64_t, int64_t, int64_t lanes) {
    return lanes >= LANES ? load(p) : load(p, first_lanes(lanes));
  }
};

#if defined(__AVX512BF16__)

// Two bfloat16 a step.
struct Pair {
  static constexpr int ELEMENTS = 2;

  static ALWAYS_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return dot_pairs(a, b, sum); }

  static ALWAYS_INLINE Vec load_along(const bfloat16* p, int64_t elements) { return load_pairs(p, elements); }
  static ALWAYS_INLINE Vec load_across(const bfloat16* p, int64_t element_stride, int64_t elements,
                                       int64_t lanes) {
    const Mask mask = first_lanes(lanes);
    return load_pairs(p, mask, p + element_stride, elements > 1 ? mask : Mask(0));
  }
};

template <class T>
using Step = std::conditional_t<std::is_same_v<T, bfloat16>, Pair, Single>;

#else

template <class T>
using Step = Single;

#endif

// A group of lanes over a stretch of k.
template <class T>
struct LaneGroup {
  const T* data;
  int64_t lane_stride, element_stride;
  int64_t count;     // lanes that the operand still has; more than LANES are not read
  int64_t elements;  // along k
};

// Writes one vector a step, `pitch` floats apart. Lanes that the operand has not get anything.
template <class T>
void pack(const LaneGroup<T>& group, float* packed, int64_t pitch);

#if defined(__AMX_BF16__)

// The same as squares, `pitch` floats apart, whose steps beyond the elements are zero.
constexpr int64_t SQUARE = MOST_TILE_ROWS * TILE_STEPS;
void pack_squares(const LaneGroup<bfloat16>& group, float* packed, int64_t pitch);

#endif

}  // namespace pyarch

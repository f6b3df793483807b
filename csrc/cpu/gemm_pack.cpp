// Packs operands; see gemm_pack.h.
#include "gemm_pack.h"

#include <algorithm>

namespace pyarch {
namespace {

// Each lane's elements are neighbours: squares of LANES lanes and steps are transposed.
template <class T>
void pack_along(const LaneGroup<T>& group, float* packed, int64_t pitch) {
  constexpr int E = Step<T>::ELEMENTS;
  for (int64_t begin = 0; begin < group.elements; begin += LANES * E, packed += LANES * pitch) {
    const int64_t elements = std::min<int64_t>(group.elements - begin, LANES * E);
    Vec square[LANES];
    unrolled<LANES>([&](auto lane) {
      const int64_t real = std::min<int64_t>(lane, group.count - 1);
      square[lane] = Step<T>::load_along(group.data + begin + real * group.lane_stride, elements);
    });
    transpose(square);
    if (elements == LANES * E) {
      unrolled<LANES>([&](auto step) { store(packed + step * pitch, square[step]); });
    } else {
      const int64_t steps = (elements + E - 1) / E;
      unrolled<LANES>([&](auto step) {
        if (step < steps) store(packed + step * pitch, square[step]);
      });
    }
  }
}

// One step's lanes from an element on: neighbours, or gathered first.
template <class T>
ALWAYS_INLINE Vec load_step(const LaneGroup<T>& group, int64_t begin) {
  constexpr int E = Step<T>::ELEMENTS;
  const int64_t elements = group.elements - begin;
  const T* const source = group.data + begin * group.element_stride;
  if (group.lane_stride == 1)
    return Step<T>::load_across(source, group.element_stride, elements, group.count);
  T block[E * LANES] = {};
  for (int64_t element = 0; element < std::min<int64_t>(elements, E); ++element)
    for (int64_t lane = 0; lane < std::min<int64_t>(group.count, LANES); ++lane)
      block[element * LANES + lane] = source[element * group.element_stride + lane * group.lane_stride];
  return Step<T>::load_across(block, LANES, elements, LANES);
}

template <class T>
void pack_by_step(const LaneGroup<T>& group, float* packed, int64_t pitch) {
  for (int64_t begin = 0; begin < group.elements; begin += Step<T>::ELEMENTS, packed += pitch)
    store(packed, load_step(group, begin));
}

}  // namespace

template <class T>
void pack(const LaneGroup<T>& group, float* packed, int64_t pitch) {
  if (group.element_stride == 1)
    pack_along(group, packed, pitch);
  else
    pack_by_step(group, packed, pitch);
}

template void pack(const LaneGroup<float>&, float*, int64_t);
template void pack(const LaneGroup<bfloat16>&, float*, int64_t);
template void pack(const LaneGroup<float16>&, float*, int64_t);

#if defined(__AMX_BF16__)

void pack_squares(const LaneGroup<bfloat16>& group, float* packed, int64_t pitch) {
  constexpr int64_t ELEMENTS = TILE_STEPS * Pair::ELEMENTS;
  for (int64_t begin = 0; begin < group.elements; begin += ELEMENTS, packed += pitch) {
    const int64_t elements = group.elements - begin;
    Vec square[LANES];
    if (group.element_stride == 1) {
      unrolled<LANES>([&](auto lane) INLINED {
        const int64_t real = std::min<int64_t>(lane, group.count - 1);
        square[lane] = load_pairs(group.data + begin + real * group.lane_stride, elements);
      });
    } else {
      unrolled<LANES>([&](auto step) INLINED {
        const int64_t first = step * Pair::ELEMENTS;
        square[step] = first < elements ? load_step(group, begin + first) : zero();
      });
      transpose(square);
    }
    unrolled<LANES>([&](auto row) INLINED { store(packed + row * TILE_STEPS, square[row]); });
  }
}

#endif

}  // namespace pyarch

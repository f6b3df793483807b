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

// One element's lanes are neighbours.
template <class T>
void pack_across(const LaneGroup<T>& group, float* packed, int64_t pitch) {
  constexpr int E = Step<T>::ELEMENTS;
  const T* source = group.data;
  for (int64_t begin = 0; begin < group.elements;
       begin += E, source += E * group.element_stride, packed += pitch)
    store(packed, Step<T>::load_across(source, group.element_stride, group.elements - begin, group.count));
}

// Nothing is: a step's elements are gathered first.
template <class T>
void pack_strided(const LaneGroup<T>& group, float* packed, int64_t pitch) {
  constexpr int E = Step<T>::ELEMENTS;
  for (int64_t begin = 0; begin < group.elements; begin += E, packed += pitch) {
    const int64_t elements = std::min<int64_t>(group.elements - begin, E);
    T block[E * LANES] = {};
    for (int64_t element = 0; element < elements; ++element)
      for (int64_t lane = 0; lane < std::min<int64_t>(group.count, LANES); ++lane)
        block[element * LANES + lane] =
            group.data[(begin + element) * group.element_stride + lane * group.lane_stride];
    store(packed, Step<T>::load_across(block, LANES, elements, LANES));
  }
}

}  // namespace

template <class T>
void pack(const LaneGroup<T>& group, float* packed, int64_t pitch) {
  if (group.element_stride == 1)
    pack_along(group, packed, pitch);
  else if (group.lane_stride == 1)
    pack_across(group, packed, pitch);
  else
    pack_strided(group, packed, pitch);
}

template void pack(const LaneGroup<float>&, float*, int64_t);
template void pack(const LaneGroup<bfloat16>&, float*, int64_t);
template void pack(const LaneGroup<float16>&, float*, int64_t);

}  // namespace pyarch

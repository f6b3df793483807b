#include "conv_tile.h"

#include <type_traits>

namespace pyarch {
namespace {

template <class T>
constexpr int LARGEST_CHUNK = std::is_same_v<T, float> ? CHUNK : SMALL_CHUNK;

template <int R, int K, class T>
ALWAYS_INLINE void correlate_chunk(Vec (&sums)[R], const T* source, int64_t step, const Vec (&weights)[K]) {
  unrolled<R + K - 1>([&](auto at) __attribute__((always_inline)) {
    const Vec value = load(source + at * step);
    unrolled<K>([&](auto k) __attribute__((always_inline)) {
      if constexpr (at >= k && at - k < R) sums[at - k] = fma(weights[k], value, sums[at - k]);
    });
  });
}

template <int R, class Out>
ALWAYS_INLINE void store_band(Out* out, int64_t step, const Vec (&sums)[R], Mask lanes, bool all_lanes) {
  if (all_lanes)
    unrolled<R>([&](auto r) { store(out + r * step, sums[r]); });
  else
    unrolled<R>([&](auto r) { store(out + r * step, sums[r], lanes); });
}

template <int R, bool VECTOR_WEIGHTS, class T>
__attribute__((noinline)) void correlate_band(const TapTables& taps, const TapRange& range,
                                              const CorrelateTile<T>& tile) {
  constexpr int WIDTH = VECTOR_WEIGHTS ? LANES : 1;
  constexpr int64_t ELEMENT_SIZES[] = {4, 2, 2};
  const auto weight_at = [](const float* p) __attribute__((always_inline)) {
    if constexpr (VECTOR_WEIGHTS)
      return load(p);
    else
      return broadcast(*p);
  };
  const int64_t step = taps.band_step, element_size = ELEMENT_SIZES[int(tile.element)];
  const int64_t heights = int64_t(taps.height.size()), depths = int64_t(taps.depth.size());
  const Chunk* const end = taps.chunks.data() + taps.chunks.size();
  for (int64_t i = 0; i < tile.run.count; ++i) {
    char* const out = static_cast<char*>(tile.out) + i * tile.run.out * element_size;
    const T* const first_source = tile.source + i * tile.run.source;
    const float* const first_weights = tile.weights + i * tile.run.weights;
    unrolled<R>([&](auto r) {
      __builtin_prefetch(first_source + r * step + tile.fetch_source);
      __builtin_prefetch(out + (r * tile.out_step + tile.fetch_out) * element_size, 1);
    });
    Vec sums[R];
    const Vec start = tile.start ? weight_at(tile.start + i * tile.run.start) : zero();
    unrolled<R>([&](auto r) { sums[r] = start; });
    for (int64_t group = 0; group < int64_t(taps.group.size()); ++group) {
      for (int64_t depth = range.depth.begin; depth < range.depth.end; ++depth) {
        for (int64_t height = range.height.begin; height < range.height.end; ++height) {
          const T* const source = first_source + taps.group[group] + taps.depth[depth] + taps.height[height];
          const float* const weights =
              first_weights + ((group * depths + depth) * heights + height) * taps.inner * WIDTH;
          const Chunk* chunk = taps.chunks.data();
          unrolled<LARGEST_CHUNK<T>>([&](auto index) __attribute__((always_inline)) {
            constexpr int K = index + 1;
            for (; chunk != end && chunk->taps == K; ++chunk) {
              if (range.skips<R, K>(*chunk, taps.spacing)) continue;
              const Span lanes = range.lane.within(chunk->lane);
              const float* lane_weights =
                  weights + (chunk->weight + (lanes.begin - chunk->lane.begin) * chunk->step) * WIDTH;
              for (int64_t lane = lanes.begin; lane < lanes.end; ++lane, lane_weights += chunk->step * WIDTH) {
                Vec held[K];
                unrolled<K>([&](auto k) { held[k] = weight_at(lane_weights + k * WIDTH); });
                correlate_chunk<R, K>(sums, source + chunk->source + taps.lane[lane], step, held);
              }
            }
          });
        }
      }
    }
    switch (tile.element) {
      case Element::float32:
        store_band(reinterpret_cast<float*>(out), tile.out_step, sums, tile.lanes, tile.all_lanes);
        break;
      case Element::bfloat16:
        store_band(reinterpret_cast<bfloat16*>(out), tile.out_step, sums, tile.lanes, tile.all_lanes);
        break;
      case Element::float16:
        store_band(reinterpret_cast<float16*>(out), tile.out_step, sums, tile.lanes, tile.all_lanes);
        break;
    }
  }
}

// With few taps in a chunk, one sum a tap would wait for itself: each tap keeps several and adds them at the end.
// A tile's sums start at zero: adding band by band keeps float32's error near the square root of a running sum's.
constexpr int chains(int taps) { return taps >= 6 ? 1 : taps >= 3 ? 2 : 4; }

template <int R, int K, class Load>
ALWAYS_INLINE void reduce_chunk(const Vec (&grad)[R], float* grad_weights, Load&& source_at) {
  constexpr int CHAINS = chains(K);
  Vec sums[CHAINS][K];
  unrolled<CHAINS>([&](auto chain) { unrolled<K>([&](auto k) { sums[chain][k] = zero(); }); });
  unrolled<R + K - 1>([&](auto at) __attribute__((always_inline)) {
    const Vec value = source_at(at);
    unrolled<K>([&](auto k) __attribute__((always_inline)) {
      if constexpr (at >= k && at - k < R)
        sums[at % CHAINS][k] = fma(grad[at - k], value, sums[at % CHAINS][k]);
    });
  });
  unrolled<K>([&](auto k) {
    unrolled<CHAINS - 1>([&](auto chain) { sums[0][k] = add(sums[0][k], sums[chain + 1][k]); });
    store(grad_weights + k * LANES, add(load(grad_weights + k * LANES), sums[0][k]));
  });
}

// Lanes beyond the output must not be read from the source either: a NaN there would survive its zero gradient.
template <int R, bool ALL_LANES, class T>
__attribute__((noinline)) void reduce_band(const TapTables& taps, const TapRange& range, const ReduceTile<T>& tile) {
  const auto load_lanes = [&](const T* p) __attribute__((always_inline)) {
    if constexpr (ALL_LANES)
      return load(p);
    else
      return load(p, tile.lanes);
  };
  const int64_t step = taps.band_step, heights = int64_t(taps.height.size());
  const Chunk* const end = taps.chunks.data() + taps.chunks.size();
  for (int64_t i = 0; i < tile.run.count; ++i) {
    const T* const first_source = tile.source + i * tile.run.source;
    const T* const first_grad = tile.grad_out + i * tile.run.out;
    Vec grad[R];
    unrolled<R>([&](auto r) { grad[r] = load_lanes(first_grad + r * tile.grad_step); });
    float* const bias = tile.grad_bias + i * tile.run.weights;
    Vec sum = load(bias);
    unrolled<R>([&](auto r) { sum = add(sum, grad[r]); });
    store(bias, sum);
    if (!tile.grad_weights) continue;

    for (int64_t depth = range.depth.begin; depth < range.depth.end; ++depth) {
      for (int64_t height = range.height.begin; height < range.height.end; ++height) {
        const T* const source = first_source + taps.depth[depth] + taps.height[height];
        float* const sums =
            tile.grad_weights + i * tile.run.weights + (depth * heights + height) * taps.inner * LANES;
        const Chunk* chunk = taps.chunks.data();
        unrolled<LARGEST_CHUNK<T>>([&](auto index) __attribute__((always_inline)) {
          constexpr int K = index + 1;
          for (; chunk != end && chunk->taps == K; ++chunk) {
            if (range.skips<R, K>(*chunk, taps.spacing)) continue;
            const Span lanes = range.lane.within(chunk->lane);
            float* lane_sums = sums + (chunk->weight + (lanes.begin - chunk->lane.begin) * chunk->step) * LANES;
            for (int64_t lane = lanes.begin; lane < lanes.end; ++lane, lane_sums += chunk->step * LANES) {
              const T* const first = source + chunk->source + taps.lane[lane];
              reduce_chunk<R, K>(grad, lane_sums, [&](auto at) __attribute__((always_inline)) {
                return load_lanes(first + at * step);
              });
            }
          }
        });
      }
    }
  }
}

// Calls visit with `band` as a constant.
template <class Visit>
void with_band(int band, Visit&& visit) {
  unrolled<BAND>([&](auto index) {
    if (band == index + 1) visit(std::integral_constant<int, index + 1>{});
  });
}

}  // namespace

void correlate_scalar_weights(int band, const TapTables& taps, const TapRange& range, const CorrelateTile<>& tile) {
  with_band(band, [&](auto size) { correlate_band<size, false>(taps, range, tile); });
}

template <class T>
void correlate_vector_weights(int band, const TapTables& taps, const TapRange& range, const CorrelateTile<T>& tile) {
  with_band(band, [&](auto size) { correlate_band<size, true>(taps, range, tile); });
}

template <class T>
void reduce(int band, const TapTables& taps, const TapRange& range, const ReduceTile<T>& tile) {
  if constexpr (std::is_same_v<T, float>)
    if (!tile.all_lanes) return with_band(band, [&](auto size) { reduce_band<size, false>(taps, range, tile); });
  with_band(band, [&](auto size) { reduce_band<size, true>(taps, range, tile); });
}

#define INSTANTIATE(T)                                                                                          \
  template void correlate_vector_weights(int, const TapTables&, const TapRange&, const CorrelateTile<T>&);      \
  template void reduce(int, const TapTables&, const TapRange&, const ReduceTile<T>&);
INSTANTIATE(float)
INSTANTIATE(bfloat16)
INSTANTIATE(float16)

}  // namespace pyarch

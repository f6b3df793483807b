// The first micro-kernel; see conv_tile.h.
#include "conv_tile.h"

namespace pyarch {
namespace {

template <int R, int K, bool PADS, class T>
ALWAYS_INLINE void correlate_chunk(Vec (&sums)[R], const T* source, int64_t step, Span real,
                                   const Vec (&weights)[K]) {
  unrolled<R + K - 1>([&](auto index) INLINED {
    constexpr int at = visited(index, R + K - 1);
    const T* const place = source + at * step;
    Vec value = load(PADS ? source_or_zeros(place, at, real) : place);
    IN_REGISTER(value);
    unrolled<K>([&](auto k) INLINED {
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
  const auto weight_at = [](const float* p) INLINED {
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
    if (tile.fetch_out)
      unrolled<R>(
          [&](auto r) { __builtin_prefetch(out + (r * tile.out_step + tile.fetch_out) * element_size, 1); });
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
          unrolled<CHUNK>([&](auto index) INLINED {
            constexpr int K = index + 1;
            for (; chunk != end && chunk->taps == K; ++chunk) {
              const Span real = range.real_sources(*chunk, R + K - 1, taps.spacing);
              if (real.begin >= R + K - 1 || real.end <= 0) continue;
              const Span lanes = range.lane.within(chunk->lane);
              const float* lane_weights =
                  weights + (chunk->weight + (lanes.begin - chunk->lane.begin) * chunk->step) * WIDTH;
              for (int64_t lane = lanes.begin; lane < lanes.end;
                   ++lane, lane_weights += chunk->step * WIDTH) {
                Vec held[K];
                unrolled<K>([&](auto k) { held[k] = weight_at(lane_weights + k * WIDTH); });
                correlate_chunk<R, K, VECTOR_WEIGHTS>(sums, source + chunk->source + taps.lane[lane], step,
                                                      real, held);
              }
            }
          });
        }
      }
    }
    switch (tile.element) {
      case Element::float32:
        if (tile.streams)
          unrolled<R>([&](auto r) { stream(reinterpret_cast<float*>(out) + r * tile.out_step, sums[r]); });
        else
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

}  // namespace

void correlate_scalar_weights(int band, const TapTables& taps, const TapRange& range,
                              const CorrelateTile<>& tile) {
  with_band(band, [&](auto size) { correlate_band<size, false>(taps, range, tile); });
}

template <class T>
void correlate_vector_weights(int band, const TapTables& taps, const TapRange& range,
                              const CorrelateTile<T>& tile) {
  with_band(band, [&](auto size) { correlate_band<size, true>(taps, range, tile); });
}

template void correlate_vector_weights(int, const TapTables&, const TapRange&, const CorrelateTile<float>&);
template void correlate_vector_weights(int, const TapTables&, const TapRange&,
                                       const CorrelateTile<bfloat16>&);
template void correlate_vector_weights(int, const TapTables&, const TapRange&, const CorrelateTile<float16>&);

}  // namespace pyarch

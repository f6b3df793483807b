// The second micro-kernel; see conv_tile.h.
#include "conv_tile.h"

namespace pyarch {
namespace {

// With few taps in a chunk, one sum a tap would wait for itself: each tap keeps several and adds them at the end.
// A tile's sums start at zero: adding band by band keeps float32's error near the square root of a running sum's.
constexpr int chains(int taps) {
  constexpr int LEFT = REGISTERS - BAND - 2;
  return 4 * taps <= LEFT ? 4 : 2 * taps <= LEFT ? 2 : 1;
}

template <int R, int K, class Load>
ALWAYS_INLINE void reduce_chunk(const Vec (&grad)[R], float* grad_weights, Load&& source_at) {
  constexpr int CHAINS = chains(K);
  Vec sums[CHAINS][K];
  unrolled<CHAINS>([&](auto chain) { unrolled<K>([&](auto k) { sums[chain][k] = zero(); }); });
  unrolled<R + K - 1>([&](auto index) INLINED {
    constexpr int at = visited(index, R + K - 1);
    Vec value = source_at(std::integral_constant<int, at>{});
    IN_REGISTER(value);
    unrolled<K>([&](auto k) INLINED {
      if constexpr (at >= k && at - k < R)
        sums[index % CHAINS][k] = fma(grad[at - k], value, sums[index % CHAINS][k]);
    });
  });
  unrolled<K>([&](auto k) {
    unrolled<CHAINS - 1>([&](auto chain) { sums[0][k] = add(sums[0][k], sums[chain + 1][k]); });
    store(grad_weights + k * LANES, add(load(grad_weights + k * LANES), sums[0][k]));
  });
}

// Lanes beyond the output must not be read from the source either: a NaN there would survive its zero gradient.
template <int R, bool ALL_LANES, bool PADS, class T>
__attribute__((noinline)) void reduce_band(const TapTables& taps, const TapRange& range,
                                           const ReduceTile<T>& tile) {
  const auto load_lanes = [&](const T* p) INLINED {
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
    Vec sum = zero();
    unrolled<R>([&](auto r) { sum = add(sum, grad[r]); });
    store(bias, add(load(bias), sum));
    if (!tile.grad_weights) continue;

    for (int64_t depth = range.depth.begin; depth < range.depth.end; ++depth) {
      for (int64_t height = range.height.begin; height < range.height.end; ++height) {
        const T* const source = first_source + taps.depth[depth] + taps.height[height];
        float* const sums =
            tile.grad_weights + i * tile.run.weights + (depth * heights + height) * taps.inner * LANES;
        const Chunk* chunk = taps.chunks.data();
        unrolled<CHUNK>([&](auto index) INLINED {
          constexpr int K = index + 1;
          for (; chunk != end && chunk->taps == K; ++chunk) {
            const Span real = range.real_sources(*chunk, R + K - 1, taps.spacing);
            if (real.begin >= R + K - 1 || real.end <= 0) continue;
            const Span lanes = range.lane.within(chunk->lane);
            float* lane_sums =
                sums + (chunk->weight + (lanes.begin - chunk->lane.begin) * chunk->step) * LANES;
            for (int64_t lane = lanes.begin; lane < lanes.end; ++lane, lane_sums += chunk->step * LANES) {
              const T* const first = source + chunk->source + taps.lane[lane];
              reduce_chunk<R, K>(grad, lane_sums, [&](auto at) INLINED {
                const T* const place = first + at * step;
                return load_lanes(PADS ? source_or_zeros(place, at, real) : place);
              });
            }
          }
        });
      }
    }
  }
}

}  // namespace

void reduce(int band, const TapTables& taps, const TapRange& range, const ReduceTile<>& tile) {
  if (tile.all_lanes)
    with_band(band, [&](auto size) { reduce_band<size, true, false>(taps, range, tile); });
  else
    with_band(band, [&](auto size) { reduce_band<size, false, false>(taps, range, tile); });
}

template <class T>
void reduce_in_place(int band, const TapTables& taps, const TapRange& range, const ReduceTile<T>& tile) {
  with_band(band, [&](auto size) { reduce_band<size, true, true>(taps, range, tile); });
}

template void reduce_in_place(int, const TapTables&, const TapRange&, const ReduceTile<float>&);
template void reduce_in_place(int, const TapTables&, const TapRange&, const ReduceTile<bfloat16>&);
template void reduce_in_place(int, const TapTables&, const TapRange&, const ReduceTile<float16>&);

}  // namespace pyarch

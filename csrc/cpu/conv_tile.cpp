#include "conv_tile.h"

#include <array>

namespace pyarch {
namespace {

template <int R, int K>
ALWAYS_INLINE void correlate_chunk(Vec (&sums)[R], const float* source, int64_t step, const Vec (&weights)[K]) {
  unrolled<R + K - 1>([&](auto at) __attribute__((always_inline)) {
    const Vec value = load(source + at * step);
    unrolled<K>([&](auto k) __attribute__((always_inline)) {
      if constexpr (at >= k && at - k < R) sums[at - k] = fma(weights[k], value, sums[at - k]);
    });
  });
}

template <int R, bool VECTOR_WEIGHTS>
__attribute__((noinline)) void correlate_band(const TapTables& taps, const TapRange& range, const CorrelateTile& tile) {
  constexpr int WIDTH = VECTOR_WEIGHTS ? LANES : 1;
  const auto weight_at = [](const float* p) __attribute__((always_inline)) {
    if constexpr (VECTOR_WEIGHTS)
      return load(p);
    else
      return broadcast(*p);
  };
  Vec sums[R];
  const Vec start = tile.start ? weight_at(tile.start) : zero();
  unrolled<R>([&](auto r) { sums[r] = start; });

  const int64_t step = taps.band_step;
  const int64_t heights = int64_t(taps.height.size()), depths = int64_t(taps.depth.size());
  const int64_t lane_taps = int64_t(taps.lane.size());
  for (int64_t group = 0; group < int64_t(taps.group.size()); ++group) {
    for (int64_t depth = range.depth.begin; depth < range.depth.end; ++depth) {
      for (int64_t height = range.height.begin; height < range.height.end; ++height) {
        const float* source = tile.source + taps.group[group] + taps.depth[depth] + taps.height[height];
        const float* weights = tile.weights + ((group * depths + depth) * heights + height) * taps.inner * WIDTH;
        const Chunk* chunk = taps.chunks.data();
        const Chunk* const end = chunk + taps.chunks.size();
        unrolled<CHUNK>([&](auto index) __attribute__((always_inline)) {
          constexpr int K = index + 1;
          for (; chunk != end && chunk->taps == K; ++chunk) {
            if (range.skips<R, K>(*chunk, taps.spacing)) continue;
            const float* chunk_source = source + chunk->source;
            const float* chunk_weights = weights + chunk->weight * WIDTH;
            for (int64_t lane = 0; lane < lane_taps; ++lane, chunk_weights += K * WIDTH) {
              Vec held[K];
              unrolled<K>([&](auto k) { held[k] = weight_at(chunk_weights + k * WIDTH); });
              correlate_chunk<R, K>(sums, chunk_source + taps.lane[lane], step, held);
            }
          }
        });
      }
    }
  }
  if (tile.all_lanes)
    unrolled<R>([&](auto r) { store(tile.out + r * tile.out_step, sums[r]); });
  else
    unrolled<R>([&](auto r) { store(tile.out + r * tile.out_step, sums[r], tile.lanes); });
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
template <int R, bool ALL_LANES>
__attribute__((noinline)) void reduce_band(const TapTables& taps, const TapRange& range, const ReduceTile& tile) {
  const auto load_lanes = [&](const float* p) __attribute__((always_inline)) {
    if constexpr (ALL_LANES)
      return load(p);
    else
      return load(p, tile.lanes);
  };
  Vec grad[R];
  unrolled<R>([&](auto r) { grad[r] = load_lanes(tile.grad_out + r * tile.grad_step); });
  if (tile.grad_bias) {
    Vec sum = load(tile.grad_bias);
    unrolled<R>([&](auto r) { sum = add(sum, grad[r]); });
    store(tile.grad_bias, sum);
  }
  if (!tile.grad_weights) return;

  const int64_t step = taps.band_step;
  const int64_t heights = int64_t(taps.height.size());
  const int64_t lane_taps = int64_t(taps.lane.size());
  for (int64_t depth = range.depth.begin; depth < range.depth.end; ++depth) {
    for (int64_t height = range.height.begin; height < range.height.end; ++height) {
      const float* source = tile.source + taps.depth[depth] + taps.height[height];
      float* sums = tile.grad_weights + (depth * heights + height) * taps.inner * LANES;
      const Chunk* chunk = taps.chunks.data();
      const Chunk* const end = chunk + taps.chunks.size();
      unrolled<CHUNK>([&](auto index) __attribute__((always_inline)) {
        constexpr int K = index + 1;
        for (; chunk != end && chunk->taps == K; ++chunk) {
          if (range.skips<R, K>(*chunk, taps.spacing)) continue;
          float* chunk_sums = sums + chunk->weight * LANES;
          for (int64_t lane = 0; lane < lane_taps; ++lane, chunk_sums += K * LANES) {
            const float* first = source + chunk->source + taps.lane[lane];
            reduce_chunk<R, K>(grad, chunk_sums, [&](auto at) __attribute__((always_inline)) {
              return load_lanes(first + at * step);
            });
          }
        }
      });
    }
  }
}

// One function a band size, found by its number.
template <template <int> class Kernel, int... R>
constexpr auto by_band(std::integer_sequence<int, R...>) {
  return std::array{Kernel<R + 1>::run...};
}
template <int R>
struct CorrelateScalar {
  static constexpr auto run = correlate_band<R, false>;
};
template <int R>
struct CorrelateVector {
  static constexpr auto run = correlate_band<R, true>;
};
template <int R>
struct ReduceAll {
  static constexpr auto run = reduce_band<R, true>;
};
template <int R>
struct ReduceSome {
  static constexpr auto run = reduce_band<R, false>;
};
constexpr auto SIZES = std::make_integer_sequence<int, BAND>{};

}  // namespace

void correlate_scalar_weights(int band, const TapTables& taps, const TapRange& range, const CorrelateTile& tile) {
  static constexpr auto kernels = by_band<CorrelateScalar>(SIZES);
  kernels[band - 1](taps, range, tile);
}

void correlate_vector_weights(int band, const TapTables& taps, const TapRange& range, const CorrelateTile& tile) {
  static constexpr auto kernels = by_band<CorrelateVector>(SIZES);
  kernels[band - 1](taps, range, tile);
}

void reduce(int band, const TapTables& taps, const TapRange& range, const ReduceTile& tile) {
  static constexpr auto all = by_band<ReduceAll>(SIZES);
  static constexpr auto some = by_band<ReduceSome>(SIZES);
  (tile.all_lanes ? all : some)[band - 1](taps, range, tile);
}

}  // namespace pyarch

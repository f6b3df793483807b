#include "recurrent_plan.h"

namespace pyarch {
namespace {

// Multiply-adds of a step below which waiting for another thread costs more than it saves.
constexpr int64_t WORTH_WAITING = 80'000;
// The same where weights are used once, as they come: then memory is what a second thread adds, but it has to be woken.
constexpr int64_t WORTH_WAKING = 200'000;
// Units of a shard come in whole cache lines of 16-bit elements.
constexpr int64_t UNIT_GRAIN = 32;
// Sequences a tile at least: with fewer, weights are read too often for the sums they make.
constexpr int64_t TILE_ROWS = 8;
// Elements of weights that a thread's cache holds; tile registers multiply more sooner than they come from elsewhere.
constexpr int64_t CACHED_WEIGHTS = 800'000, UNCACHED_TILE_ROWS = 64;

}  // namespace

Steps::Steps(const RecurrentShape& shape) : length_(shape.batch, shape.steps) {
  first_.reserve(shape.steps + 1);
  alive_.reserve(shape.steps);
  int64_t row = 0;
  for (int64_t step = 0; step < shape.steps; ++step) {
    const int64_t alive = shape.batch_sizes ? shape.batch_sizes[step] : shape.batch;
    const int64_t before = step ? alive_.back() : alive;
    for (int64_t sequence = alive; sequence < before; ++sequence) length_[sequence] = step;
    first_.push_back(row);
    alive_.push_back(alive);
    row += alive;
  }
  first_.push_back(row);
}

Plan plan_shards(const RecurrentShape& shape, const Steps& steps, int threads, bool in_tiles) {
  Plan plan;
  plan.packs = shape.steps > 2 || shape.batch > 4 || shape.has_projection;
  const int64_t depth = shape.projected + (plan.packs ? 0 : shape.input_size);
  const int64_t step_work = shape.batch * shape.gates() * shape.hidden * depth;
  const int64_t free_threads = std::max<int64_t>(1, threads / shape.directions);
  const bool cached = shape.gates() * shape.hidden * shape.projected <= CACHED_WEIGHTS;
  const int64_t tile_rows = in_tiles && !cached && !shape.has_projection ? UNCACHED_TILE_ROWS : TILE_ROWS;
  plan.tiles = std::clamp<int64_t>(shape.batch / tile_rows, 1, free_threads);
  plan.parts = shape.has_projection ? 1 : free_threads / plan.tiles;
  plan.parts = std::clamp<int64_t>(plan.parts, 1,
                                   1 + step_work / plan.tiles / (plan.packs ? WORTH_WAITING : WORTH_WAKING));
  plan.parts = std::min(plan.parts, ceil_div(shape.hidden, UNIT_GRAIN));

  // Tiles end where the sequences before make up their share of all rows.
  std::vector<int64_t> ends;
  int64_t sequence = 0, rows = 0;
  for (int64_t tile = 1; tile < plan.tiles; ++tile) {
    while (rows * plan.tiles < shape.rows * tile) rows += steps.length(sequence++);
    ends.push_back(sequence);
  }
  ends.push_back(shape.batch);
  plan.most_rows = 1;
  for (int64_t direction = 0; direction < shape.directions; ++direction)
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
      const int64_t row_begin = tile ? ends[tile - 1] : 0, team = int64_t(plan.shards.size());
      plan.most_rows = std::max(plan.most_rows, ends[tile] - row_begin);
      const int64_t grains = ceil_div(shape.hidden, UNIT_GRAIN);
      for (int64_t part = 0; part < plan.parts; ++part) {
        const auto edge = [&](int64_t p) {
          return std::min(shape.hidden, grains * p / plan.parts * UNIT_GRAIN);
        };
        plan.shards.push_back(
            {direction, part, row_begin, ends[tile], edge(part), edge(part + 1), team, team + plan.parts});
      }
    }
  return plan;
}

}  // namespace pyarch

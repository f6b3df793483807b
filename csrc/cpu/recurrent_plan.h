// How the work of a recurrent layer is laid out: rows of each step, shards of each thread, scratch memory.
#pragma once

#include <cstddef>
#include <vector>

#include "recurrent.h"
#include "recurrent_product.h"
#include "team.h"

namespace pyarch {

// Where the rows of each step are.
class Steps {
 public:
  explicit Steps(const RecurrentShape& shape);

  int64_t count() const { return int64_t(alive_.size()); }
  int64_t first(int64_t step) const { return first_[step]; }  // row; of `count()`, one past the last
  int64_t alive(int64_t step) const { return alive_[step]; }

  // The `index`-th step that a direction takes.
  int64_t taken(bool reverse, int64_t index) const { return reverse ? count() - 1 - index : index; }

  // The row from which a sequence's state came to its row at `step`; -1 where that is its initial state.
  int64_t row_before(bool reverse, int64_t step, int64_t sequence) const {
    if (!reverse) return step == 0 ? -1 : first_[step - 1] + sequence;
    return step + 1 < count() && sequence < alive_[step + 1] ? first_[step + 1] + sequence : -1;
  }

  int64_t length(int64_t sequence) const { return length_[sequence]; }

  // The row after which a sequence's state is final.
  int64_t final_row(bool reverse, int64_t sequence) const {
    return reverse ? sequence : first_[length_[sequence] - 1] + sequence;
  }

 private:
  std::vector<int64_t> first_, alive_, length_;
};

// Hidden units [unit_begin, unit_end) of sequences [row_begin, row_end) of one direction. Shards that differ in units
// alone are a team: they read each other's units at every step.
struct Shard {
  int64_t direction, part;  // part: number within the team
  int64_t row_begin, row_end, unit_begin, unit_end;
  int64_t team_begin, team_end;

  int64_t rows() const { return row_end - row_begin; }
  int64_t units() const { return unit_end - unit_begin; }
  int64_t gate_stride() const { return round_up(units(), LANES); }  // of gates in the product's columns
  int64_t rows_alive(const Steps& steps, int64_t step) const {
    return std::clamp<int64_t>(steps.alive(step) - row_begin, 0, rows());
  }
};

// Shards in team order; `parts` a team. Sequences are shared out first, for threads then never wait for one another;
// units only where a step is long enough to make up for the waiting.
struct Plan {
  std::vector<Shard> shards;
  int64_t parts;
  int64_t tiles;      // of sequences, a direction
  int64_t most_rows;  // of a shard
  bool packs;         // whether weights are read often enough for packing to pay

  // The shard of a direction's first tile: all tiles share its packed weights.
  const Shard& sample(int64_t direction, int64_t part) const {
    return shards[(direction * tiles) * parts + part];
  }
};
// `in_tiles`: whether tile registers multiply.
Plan plan_shards(const RecurrentShape& shape, const Steps& steps, int threads, bool in_tiles);

// Whether so many multiply-adds are worth a second thread's start.
constexpr bool worth_threads(int64_t multiply_adds) { return multiply_adds > 100'000; }

// Hands out pieces of scratch, each aligned to a cache line; without memory it only counts.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<std::byte*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* memory_;
  int64_t used_ = 0;
};

}  // namespace pyarch

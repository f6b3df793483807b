// Threads that walk through the same steps together, each waiting at the end of a step for those it reads from.
//
// The members of a team are shards of work. A pool of threads takes them in ranges, and promises nothing about running
// the ranges at the same time; so every range first reports, and when not all have reported soon, the first to give up
// waiting takes over all shards, and later ranges find nothing left to do.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <vector>

#include "parallel.h"
#include "vec.h"

namespace pyarch {

// Waits for a condition: a short while in the hope that another core is about to meet it, then giving way to others.
template <class Condition>
void spin_until(Condition&& condition) {
  for (int tries = 0; !condition(); ++tries) {
    if (tries < 4096)
      _mm_pause();
    else
      sched_yield();
  }
}

class Team {
 public:
  explicit Team(int64_t shards) : shards_(shards), done_(shards) {}

  // Calls body(begin, end) for ranges that cover all shards and run at the same time.
  void run(const ParallelFor& parallel, const std::function<void(int64_t, int64_t)>& body) {
    if (shards_ == 1) return body(0, 1);
    parallel(shards_, [&](int64_t begin, int64_t end) {
      const Range range = gather({begin, end});
      if (range.begin < range.end) body(range.begin, range.end);
    });
  }

  // A shard has finished a step, numbered from 1.
  void finish(int64_t shard, int64_t step) { done_[shard].step.store(step, std::memory_order_release); }

  // Until the shards [begin, end) have finished that step.
  void wait(int64_t begin, int64_t end, int64_t step) {
    for (int64_t shard = begin; shard < end; ++shard)
      spin_until([&] { return done_[shard].step.load(std::memory_order_acquire) >= step; });
  }

 private:
  struct Range {
    int64_t begin, end;
  };
  struct alignas(64) Progress {
    std::atomic<int64_t> step{0};
  };
  static constexpr int64_t TAKEN = -1;
  static constexpr auto PATIENCE = std::chrono::milliseconds(2);

  Range gather(Range range) {
    int64_t reported = reported_.load();
    do {
      if (reported == TAKEN) return {0, 0};
    } while (!reported_.compare_exchange_weak(reported, reported + range.end - range.begin));
    const auto deadline = std::chrono::steady_clock::now() + PATIENCE;
    for (int tries = 1;; ++tries) {
      reported = reported_.load();
      if (reported == shards_) return range;
      if (reported == TAKEN) return {0, 0};
      _mm_pause();
      if (tries % 256 == 0 && std::chrono::steady_clock::now() > deadline &&
          reported_.compare_exchange_strong(reported, TAKEN))
        return {0, shards_};
    }
  }

  const int64_t shards_;
  std::atomic<int64_t> reported_{0};
  std::vector<Progress> done_;
};

}  // namespace pyarch

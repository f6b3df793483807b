// How attention is shared out among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "attention_operands.h"

namespace pyarch {

// Strips, and so rows at most, that meet a block of keys before the next block: an even number of strips.
template <class T>
constexpr int64_t CHUNK_STRIPS = 128 / STRIP<T> / 2 * 2;
template <class T>
constexpr int64_t CHUNK = CHUNK_STRIPS<T> * STRIP<T>;

// Multiply-adds of the two products of a forward, about; a window sees a block or two.
inline double attention_work(const AttentionShape& shape) {
  return double(shape.batch * shape.heads) * double(shape.queries) * double(std::min(shape.keys, KEY_BLOCK)) *
         double(shape.head_dim + shape.value_dim);
}

template <class Call>
double attention_work(std::span<const Call> calls) {
  double work = 0;
  for (const Call& call : calls) work += attention_work(call.shape);
  return work;
}

// One Made of each call; those whose units weigh most come first.
template <class Made, class Call>
std::vector<Made> heaviest_first(std::span<const Call> calls) {
  std::vector<Made> made;
  for (const Call& call : calls) made.emplace_back(call);
  std::vector<int64_t> order(made.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return made[a].unit_weight() > made[b].unit_weight(); });
  std::vector<Made> sorted;
  for (const int64_t index : order) sorted.push_back(made[index]);
  return sorted;
}

// Whether some batch entry may have keys that no query sees.
inline bool clears_keys(const AttentionShape& shape, const AttentionPattern& pattern) {
  for (int64_t b = 0; b < (pattern.padding.data ? shape.batch : 1); ++b)
    if (!Sight(shape, pattern, b).sees_every_key()) return true;
  return false;
}

// Threads that take the next task as they come free.
class Tasks {
 public:
  Tasks(double work, int64_t threads)
      : threads_(std::clamp<int64_t>(int64_t(std::min(work / THREAD_WORK, 1e9)), 1, threads)) {}

  int64_t threads() const { return threads_; }

  // Whether all threads have about as much to do when each takes whole ones of `tasks`.
  bool share_evenly(int64_t tasks) const {
    return threads_ == 1 || tasks % threads_ == 0 || tasks >= 4 * threads_;
  }

  // The same of tasks that differ, the heaviest of which is taken first.
  bool share_evenly(int64_t tasks, double heaviest, double all) const {
    return heaviest * double(tasks) == all ? share_evenly(tasks)
                                           : threads_ == 1 || heaviest * double(4 * threads_) <= all;
  }

  // Calls body(task, thread) once for every task, with tile registers set up where T needs them.
  template <class T, class Body>
  void each(int64_t tasks, const ParallelFor& parallel, Body&& body) const {
    if (threads_ == 1) {
      [[maybe_unused]] const Registers<T> registers;
      for (int64_t task = 0; task < tasks; ++task) body(task, int64_t(0));
      return;
    }
    std::atomic<int64_t> next{0};
    parallel(threads_, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] const Registers<T> registers;
      for (int64_t thread = begin; thread < end; ++thread)
        for (int64_t task = next++; task < tasks; task = next++) body(task, thread);
    });
  }

 private:
  struct NoRegisters {};
#if defined(__AMX_BF16__)
  template <class T>
  using Registers = std::conditional_t<IN_TILES<T>, TileRegisters, NoRegisters>;
#else
  template <class T>
  using Registers = NoRegisters;
#endif

  static constexpr double THREAD_WORK = 256 * 1024;  // multiply-adds that are worth a thread

  const int64_t threads_;
};

// The tasks of several calls, one call's behind another's.
class TasksOfCalls {
 public:
  void append(int64_t tasks) { ends_.push_back(count() + tasks); }
  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }

  struct Place {
    int64_t call, task;
  };
  Place at(int64_t task) const {
    const int64_t call = std::upper_bound(ends_.begin(), ends_.end(), task) - ends_.begin();
    return {call, call ? task - ends_[call - 1] : task};
  }

 private:
  std::vector<int64_t> ends_;
};

}  // namespace pyarch

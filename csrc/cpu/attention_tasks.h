// How attention is shared out among threads.
#pragma once

#include <algorithm>
#include <atomic>

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

}  // namespace pyarch

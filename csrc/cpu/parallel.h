// How kernels run on several threads, none of which they own.
#pragma once

#include <cstdint>
#include <functional>

namespace pyarch {

// Calls body(begin, end) on disjoint ranges that cover [0, tasks), from several threads.
using ParallelFor =
    std::function<void(int64_t tasks, const std::function<void(int64_t begin, int64_t end)>& body)>;

}  // namespace pyarch

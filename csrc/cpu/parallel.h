// How kernels run on several threads, none of which they own.
#pragma once

#include <cstdint>
#include <functional>

namespace pyarch {

// Calls body(begin, end) on disjoint ranges that cover [0, tasks), from several threads.
using ParallelFor =
    std::function<void(int64_t tasks, const std::function<void(int64_t begin, int64_t end)>& body)>;

// Gives so many bytes of scratch, 64-byte aligned, that live until the call ends.
using GiveScratch = std::function<void*(int64_t bytes)>;

}  // namespace pyarch

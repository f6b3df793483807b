// Products of matrices on the CPU.
//
//   C[m, n] = sum_k A[m, k] * B[k, n]  (+ bias[n])  (+ C[m, n])
//
// Products are summed in float32; a 16-bit C is rounded once. The order in which one element's products are summed
// depends on k alone, so that results are the same bits for any number of threads and any m, n and strides. A row
// of A reaches its own row of C only, a column of B its own column, NaN and infinities included.
//
// No function here knows torch or allocates: scratch comes from the caller, and threads come through `ParallelFor`.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "vec.h"

namespace pyarch {

// A matrix of any strides; fast where one of them is 1.
template <class T>
struct Operand {
  const T* data;
  int64_t row_stride, column_stride;

  Operand transposed() const { return {data, column_stride, row_stride}; }
};

// The matrix that is written: rows of neighbouring elements.
template <class T>
struct Target {
  T* data;
  int64_t row_stride;
};

struct GemmShape {
  int64_t m, n, k;
};

// The bytes of scratch that are enough for every product of at most so many rows, columns and steps with up to so many
// threads. They begin at any address.
template <class T, class Out>
int64_t gemm_scratch_bytes(const GemmShape& shape, int64_t threads);

// `bias` may be null. `threads` is the largest number of tasks that `parallel` is given; one task runs in the
// caller.
template <class T, class Out>
void gemm(const GemmShape& shape, const Operand<T>& a, const Operand<T>& b, const float* bias,
          bool accumulate, const Target<Out>& c, void* scratch, int64_t threads, const ParallelFor& parallel);

}  // namespace pyarch

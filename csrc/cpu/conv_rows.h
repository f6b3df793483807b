// Small kernels on planes in (N, C, H, W) order whose rows are read where they are, with no copy.
#pragma once

#include "conv.h"

namespace pyarch {

bool forward_reads_rows_in_place(const ConvShape& shape);
bool backward_reads_rows_in_place(const ConvShape& shape);
template <class T>
void forward_rows_in_place(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel);
template <class T>
void backward_rows_in_place(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel);

}  // namespace pyarch

// Kernels on planes in (N, C, H, W) order that have a way of their own.
#pragma once

#include "conv.h"

namespace pyarch {

// Small kernels whose rows are read where they are, with no copy; see conv_rows_in_place.cpp.
bool reads_rows_in_place(const ConvShape& shape);
template <class T>
void forward_rows_in_place(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel);
template <class T>
void backward_rows_in_place(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel);

// Longer kernels on rows alone, LANES rows at a time; see conv_turned.cpp.
bool turns_rows(const ConvShape& shape);
template <class T>
void forward_turned(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel);
template <class T>
void backward_turned(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel);

}  // namespace pyarch

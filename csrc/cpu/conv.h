// Depthwise convolution on the CPU: what the kernels are told, and their entry points.
//
//   output[n, o, i] = bias[o] + sum_t weight[o, t] * input[n, o / m, source(i * stride + t * dilation - before)]
//
// 1-D and 2-D calls are 3-D ones whose leading dimensions have size 1. Sums run in float32. No function here knows
// torch: memory comes from the caller or is scratch, and threads come through `ParallelFor`.
//
// Legend: N batch, C channels, m depth multiplier, O = C * m; D, H, W depth, height, width; a tap is one kernel element.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "vec.h"

namespace pyarch {

enum class PaddingMode { zeros, reflect, replicate, circular };

struct ConvShape {
  int64_t batch, channels, multiplier;
  int64_t in[3], kernel[3], out[3], stride[3], before[3], dilation[3];  // depth, height, width
  PaddingMode mode;

  int64_t output_channels() const { return channels * multiplier; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t in_size() const { return in[0] * in[1] * in[2]; }
  int64_t out_size() const { return out[0] * out[1] * out[2]; }
};

// input and output are contiguous in (N, C, D, H, W) order ("rows") or (N, D, H, W, C) order ("channels");
// weight is (O, taps); bias is (O) or null.
template <class T>
struct ForwardArgs {
  T* output;
  const T* input;
  const T* weight;
  const T* bias;
};

// Gradients that nobody asked for are null. Layouts as above.
template <class T>
struct BackwardArgs {
  T* grad_input;
  T* grad_weight;
  T* grad_bias;
  const T* grad_output;
  const T* input;
  const T* weight;
};

template <class T>
void conv_forward_rows(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel);
template <class T>
void conv_forward_channels(const ConvShape& shape, const ForwardArgs<T>& args, const ParallelFor& parallel);
template <class T>
void conv_backward_rows(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel);
template <class T>
void conv_backward_channels(const ConvShape& shape, const BackwardArgs<T>& args, const ParallelFor& parallel);

}  // namespace pyarch

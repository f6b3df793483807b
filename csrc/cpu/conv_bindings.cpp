// Binds the depthwise convolutions; see bindings.h.
#include "bindings.h"
#include "conv.h"

namespace pyarch {
namespace {

const char* const PADDING_MODES[] = {"zeros", "reflect", "replicate", "circular"};

PaddingMode padding_mode(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == PADDING_MODES[i]) return PaddingMode(i);
  STD_TORCH_CHECK(false, "padding_mode ", name, ", needs zeros, reflect, replicate or circular");
}

// Missing leading dimensions have size 1.
ConvShape shape_of(const Tensor& input, const Tensor& weight, const Tensor& output, const Integers& stride,
                   const Integers& padding, const Integers& dilation, const std::string& mode) {
  const int dimensions = int(weight.dim()) - 2, missing = 3 - dimensions;
  ConvShape shape{};
  shape.batch = input.size(0);
  shape.channels = input.size(1);
  shape.multiplier = weight.size(0) / input.size(1);
  shape.mode = padding_mode(mode);
  for (int i = 0; i < 3; ++i) {
    const int from = i - missing;
    const bool present = from >= 0;
    shape.in[i] = present ? input.size(2 + from) : 1;
    shape.kernel[i] = present ? weight.size(2 + from) : 1;
    shape.out[i] = present ? output.size(2 + from) : 1;
    shape.stride[i] = present ? stride[from] : 1;
    shape.dilation[i] = present ? dilation[from] : 1;
    shape.before[i] = present ? padding[2 * from] : 0;
  }
  return shape;
}

void depthwise_conv_forward(const Tensor& output, const Tensor& input, const Tensor& weight,
                            const std::optional<Tensor>& bias, Integers stride, Integers padding,
                            Integers dilation, std::string mode, bool channels_last) {
  const ConvShape shape = shape_of(input, weight, output, stride, padding, dilation, mode);
  with_element_type("depthwise_conv", input, [&](auto element) {
    using T = decltype(element);
    const ForwardArgs<T> args{data<T>(output), data<T>(input), data<T>(weight), data<T>(bias)};
    (channels_last ? conv_forward_channels<T> : conv_forward_rows<T>)(shape, args, on_torch_threads);
  });
}

void depthwise_conv_backward(const std::optional<Tensor>& grad_input,
                             const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_bias,
                             const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                             Integers stride, Integers padding, Integers dilation, std::string mode,
                             bool channels_last) {
  const ConvShape shape = shape_of(input, weight, grad_output, stride, padding, dilation, mode);
  with_element_type("depthwise_conv", input, [&](auto element) {
    using T = decltype(element);
    const BackwardArgs<T> args{data<T>(grad_input),  data<T>(grad_weight), data<T>(grad_bias),
                               data<T>(grad_output), data<T>(input),       data<T>(weight)};
    (channels_last ? conv_backward_channels<T> : conv_backward_rows<T>)(shape, args, on_torch_threads);
  });
}

}  // namespace
}  // namespace pyarch

STABLE_TORCH_LIBRARY_FRAGMENT(PYARCH_NAMESPACE, library) {
  library.def(
      "depthwise_conv_forward(Tensor(a!) output, Tensor input, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, str padding_mode, bool channels_last) -> ()");
  library.def(
      "depthwise_conv_backward(Tensor(a!)? grad_input, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, "
      "Tensor grad_output, Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, "
      "str padding_mode, bool channels_last) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(PYARCH_NAMESPACE, CPU, library) {
  library.impl("depthwise_conv_forward", TORCH_BOX(&pyarch::depthwise_conv_forward));
  library.impl("depthwise_conv_backward", TORCH_BOX(&pyarch::depthwise_conv_backward));
}

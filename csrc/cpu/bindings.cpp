// Binds the kernels to torch through its stable ABI: unpacks tensors into pointers and shapes, and lends its threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "conv.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Integers = std::vector<int64_t>;

const char* const PADDING_MODES[] = {"zeros", "reflect", "replicate", "circular"};

pyarch::PaddingMode padding_mode(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == PADDING_MODES[i]) return pyarch::PaddingMode(i);
  STD_TORCH_CHECK(false, "padding_mode ", name, ", needs zeros, reflect, replicate or circular");
}

// Missing leading dimensions have size 1.
pyarch::ConvShape shape_of(const Tensor& input, const Tensor& weight, const Tensor& output,
                           const Integers& stride, const Integers& padding, const Integers& dilation,
                           const std::string& mode) {
  const int dimensions = int(weight.dim()) - 2, missing = 3 - dimensions;
  pyarch::ConvShape shape{};
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

void on_torch_threads(int64_t tasks, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, tasks, 1, body);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// Calls body with a value of the element type that the tensor holds.
template <class Body>
void with_element_type(const Tensor& tensor, Body&& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(pyarch::bfloat16{});
    case ScalarType::Half:
      return body(pyarch::float16{});
    default:
      STD_TORCH_CHECK(false, "depthwise_conv: needs float32, bfloat16 or float16");
  }
}

void depthwise_conv_forward(const Tensor& output, const Tensor& input, const Tensor& weight,
                            const std::optional<Tensor>& bias, Integers stride, Integers padding,
                            Integers dilation, std::string mode, bool channels_last) {
  const pyarch::ConvShape shape = shape_of(input, weight, output, stride, padding, dilation, mode);
  with_element_type(input, [&](auto element) {
    using T = decltype(element);
    const pyarch::ForwardArgs<T> args{data<T>(output), data<T>(input), data<T>(weight), data<T>(bias)};
    (channels_last ? pyarch::conv_forward_channels<T> : pyarch::conv_forward_rows<T>)(shape, args,
                                                                                      on_torch_threads);
  });
}

void depthwise_conv_backward(const std::optional<Tensor>& grad_input,
                             const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_bias,
                             const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                             Integers stride, Integers padding, Integers dilation, std::string mode,
                             bool channels_last) {
  const pyarch::ConvShape shape = shape_of(input, weight, grad_output, stride, padding, dilation, mode);
  with_element_type(input, [&](auto element) {
    using T = decltype(element);
    const pyarch::BackwardArgs<T> args{data<T>(grad_input),  data<T>(grad_weight), data<T>(grad_bias),
                                       data<T>(grad_output), data<T>(input),       data<T>(weight)};
    (channels_last ? pyarch::conv_backward_channels<T> : pyarch::conv_backward_rows<T>)(shape, args,
                                                                                        on_torch_threads);
  });
}

}  // namespace

// The namespace is a macro: one a library, so that every instruction set's kernels can be loaded side by side.
STABLE_TORCH_LIBRARY(PYARCH_NAMESPACE, library) {
  library.def(
      "depthwise_conv_forward(Tensor(a!) output, Tensor input, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, str padding_mode, bool channels_last) -> ()");
  library.def(
      "depthwise_conv_backward(Tensor(a!)? grad_input, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, "
      "Tensor grad_output, Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, "
      "str padding_mode, bool channels_last) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(PYARCH_NAMESPACE, CPU, library) {
  library.impl("depthwise_conv_forward", TORCH_BOX(&depthwise_conv_forward));
  library.impl("depthwise_conv_backward", TORCH_BOX(&depthwise_conv_backward));
}

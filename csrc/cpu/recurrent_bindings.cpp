// Binds the recurrent layers; see bindings.h and recurrent.h.
#include "recurrent.h"

#include "bindings.h"

namespace pyarch {
namespace {

const char* const MODES[] = {"lstm", "gru", "rnn_tanh", "rnn_relu"};

Mode mode_of(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == MODES[i]) return Mode(i);
  STD_TORCH_CHECK(false, "mode ", name, ", needs lstm, gru, rnn_tanh or rnn_relu");
}

// `weights` is flat over directions: w_ih, w_hh, then both biases where there are any, then w_hr where it projects.
struct Flat {
  int64_t a_direction;

  bool has_projection() const { return a_direction % 2 == 1; }
  bool has_bias() const { return a_direction >= 4; }
};

RecurrentShape shape_of(const std::string& mode, const Tensor& input, const Tensor& h0,
                        const std::vector<Tensor>& weights, const std::optional<Tensor>& batch_sizes) {
  RecurrentShape shape{};
  shape.mode = mode_of(mode);
  shape.directions = h0.size(0);
  shape.batch = h0.size(1);
  shape.projected = h0.size(2);
  shape.hidden = weights[0].size(0) / shape.gates();
  shape.input_size = weights[0].size(1);
  shape.has_projection = Flat{int64_t(weights.size()) / shape.directions}.has_projection();
  shape.batch_sizes = data<int64_t>(batch_sizes);
  shape.steps = batch_sizes ? batch_sizes->numel() : input.size(0);
  shape.rows = batch_sizes ? input.size(0) : input.size(0) * shape.batch;
  return shape;
}

// One direction's pointers; an empty tensor stands for a gradient that nobody asked for.
template <class Pointers, class T>
std::vector<Pointers> pointers_of(const std::vector<Tensor>& flat, int64_t directions) {
  const Flat layout{int64_t(flat.size()) / directions};
  std::vector<Pointers> pointers;
  for (int64_t d = 0; d < directions; ++d) {
    const auto at = [&](int64_t index) {
      const Tensor& tensor = flat[d * layout.a_direction + index];
      return tensor.numel() ? data<T>(tensor) : nullptr;
    };
    pointers.push_back({at(0), at(1), layout.has_bias() ? at(2) : nullptr,
                        layout.has_bias() ? at(3) : nullptr,
                        layout.has_projection() ? at(layout.a_direction - 1) : nullptr});
  }
  return pointers;
}

void forward(const Tensor& output, const Tensor& h_n, const std::optional<Tensor>& c_n,
             const std::optional<Tensor>& gates, const std::optional<Tensor>& cells, const Tensor& input,
             const Tensor& h0, const std::optional<Tensor>& c0, std::vector<Tensor> weights,
             const std::optional<Tensor>& batch_sizes, std::string mode) {
  const RecurrentShape shape = shape_of(mode, input, h0, weights, batch_sizes);
  const int threads = int(torch::stable::get_num_threads());
  with_element_type("recurrent_forward", input, [&](auto element) {
    using T = decltype(element);
    const auto parameters = pointers_of<RecurrentWeights<T>, T>(weights, shape.directions);
    const RecurrentForward<T> args{data<T>(output), data<T>(h_n),       data<T>(c_n),
                                   data<T>(gates),  data<float>(cells), data<T>(input),
                                   data<T>(h0),     data<T>(c0),        parameters.data()};
    Scratch scratch{input};
    recurrent_forward<T>(shape, args, std::ref(scratch), threads, on_torch_threads);
  });
}

void backward(const std::optional<Tensor>& grad_input, const std::optional<Tensor>& grad_h0,
              const std::optional<Tensor>& grad_c0, std::vector<Tensor> grad_weights,
              const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_h_n,
              const std::optional<Tensor>& grad_c_n, const Tensor& input, const Tensor& h0,
              const std::optional<Tensor>& c0, std::vector<Tensor> weights,
              const std::optional<Tensor>& batch_sizes, const Tensor& output, const Tensor& gates,
              const Tensor& cells, std::string mode) {
  const RecurrentShape shape = shape_of(mode, input, h0, weights, batch_sizes);
  const int threads = int(torch::stable::get_num_threads());
  with_element_type("recurrent_backward", input, [&](auto element) {
    using T = decltype(element);
    const auto parameters = pointers_of<RecurrentWeights<T>, T>(weights, shape.directions);
    const auto gradients = pointers_of<RecurrentGradients<T>, T>(grad_weights, shape.directions);
    const RecurrentBackward<T> args{
        data<T>(grad_input), data<T>(grad_h0),  data<T>(grad_c0), gradients.data(),  data<T>(grad_output),
        data<T>(grad_h_n),   data<T>(grad_c_n), data<T>(input),   data<T>(h0),       data<T>(c0),
        parameters.data(),   data<T>(output),   data<T>(gates),   data<float>(cells)};
    Scratch scratch{input};
    recurrent_backward<T>(shape, args, std::ref(scratch), threads, on_torch_threads);
  });
}

}  // namespace
}  // namespace pyarch

STABLE_TORCH_LIBRARY_FRAGMENT(PYARCH_NAMESPACE, library) {
  library.def(
      "recurrent_forward(Tensor(a!) output, Tensor(b!) h_n, Tensor(c!)? c_n, Tensor(d!)? gates, Tensor(e!)? "
      "cells, "
      "Tensor input, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, str mode) -> ()");
  library.def(
      "recurrent_backward(Tensor(a!)? grad_input, Tensor(b!)? grad_h0, Tensor(c!)? grad_c0, Tensor(d!)[] "
      "grad_weights, "
      "Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor h0, Tensor? c0, "
      "Tensor[] weights, "
      "Tensor? batch_sizes, Tensor output, Tensor gates, Tensor cells, str mode) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(PYARCH_NAMESPACE, CPU, library) {
  library.impl("recurrent_forward", TORCH_BOX(&pyarch::forward));
  library.impl("recurrent_backward", TORCH_BOX(&pyarch::backward));
}

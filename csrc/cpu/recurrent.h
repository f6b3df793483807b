// One recurrent layer, all its directions, on the CPU: what the kernels are told, and their entry points.
//
//   lstm  i, f, o = sigmoid, g = tanh of W_ih x + b_ih + W_hh h + b_hh;  c' = f c + i g;  h' = o tanh(c')
//         with a projection h' = W_hr (o tanh(c'))
//   gru   r, z = sigmoid(...);  q = W_hn h + b_hn;  n = tanh(W_in x + b_in + r q);  h' = (1 - z) n + z h
//   rnn   h' = tanh or relu of W_ih x + b_ih + W_hh h + b_hh
//
// Sums, c and carried states are float32; h is rounded to the element type where it enters a product. No function here
// knows torch: memory comes from the caller, and threads come through `ParallelFor`.
//
// Legend: T steps, B sequences, N rows (one a sequence and step, in time order), I input size, H hidden units, P size of
// h (H without a projection), D directions, G gates a unit.
#pragma once

#include <cstdint>
#include <functional>
#include <type_traits>

#include "parallel.h"
#include "vec.h"

namespace pyarch {

enum class Mode { lstm, gru, rnn_tanh, rnn_relu };

struct RecurrentShape {
  Mode mode;
  int64_t steps, batch, rows, input_size, hidden, projected, directions;
  bool has_projection;
  const int64_t* batch_sizes;  // sequences alive at each step, falling; null where all of them always are

  int64_t gates() const { return mode == Mode::lstm ? 4 : mode == Mode::gru ? 3 : 1; }
  // Blocks of H that a row's saved gates and gate gradients take: gru's fourth is q, and the input side's n.
  int64_t saved() const { return mode == Mode::lstm || mode == Mode::gru ? 4 : 1; }
};

// Calls body with the mode as a constant.
template <class Body>
void with_mode(Mode mode, Body&& body) {
  switch (mode) {
    case Mode::lstm:
      return body(std::integral_constant<Mode, Mode::lstm>{});
    case Mode::gru:
      return body(std::integral_constant<Mode, Mode::gru>{});
    case Mode::rnn_tanh:
      return body(std::integral_constant<Mode, Mode::rnn_tanh>{});
    case Mode::rnn_relu:
      return body(std::integral_constant<Mode, Mode::rnn_relu>{});
  }
}

// One direction's parameters, row-major; null where the layer has none.
template <class T>
struct RecurrentWeights {
  const T* w_ih;  // (G * H, I)
  const T* w_hh;  // (G * H, P)
  const T* b_ih;  // (G * H)
  const T* b_hh;
  const T* w_hr;  // (P, H)
};

template <class T>
struct RecurrentForward {
  T* output;                           // (N, D * P)
  T* h_n;                              // (D, B, P)
  T* c_n;                              // (D, B, H), lstm
  T* gates;                            // (D, N, 4 * H): i f g o or r z n q; null where nothing is saved
  float* cells;                        // (D, N, H), lstm; null where nothing is saved
  const T* input;                      // (N, I)
  const T* h0;                         // (D, B, P)
  const T* c0;                         // (D, B, H)
  const RecurrentWeights<T>* weights;  // one a direction
};

// Gradients that nobody asked for, and incoming ones that are zero, are null.
template <class T>
struct RecurrentGradients {
  T *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
};
template <class T>
struct RecurrentBackward {
  T* grad_input;
  T* grad_h0;
  T* grad_c0;
  const RecurrentGradients<T>* grad_weights;  // one a direction
  const T* grad_output;
  const T* grad_h_n;
  const T* grad_c_n;
  const T* input;
  const T* h0;
  const T* c0;
  const RecurrentWeights<T>* weights;
  const T* output;
  const T* gates;
  const float* cells;
};

template <class T>
void recurrent_forward(const RecurrentShape& shape, const RecurrentForward<T>& args, const GiveScratch& give,
                       int threads, const ParallelFor& parallel);
template <class T>
void recurrent_backward(const RecurrentShape& shape, const RecurrentBackward<T>& args,
                        const GiveScratch& give, int threads, const ParallelFor& parallel);

}  // namespace pyarch

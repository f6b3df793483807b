// The pointwise part of a step, forward and backward, for one row: each gate's formula stands here and nowhere else.
#pragma once

#include "activation.h"
#include "recurrent.h"
#include "recurrent_product.h"

namespace pyarch {

// What a row reads and writes in the forward pass, from its shard's first unit on. Saved gates may lie where the input
// side's sums do: every unit is read before it is written.
template <class T>
struct ForwardRow {
  const float* hidden_side;  // W_hh h + b_hh, gates `shard_units` apart
  int64_t shard_units;
  const float* input_side;  // W_ih x + b_ih, gates `units` apart
  T* gates;                 // saved ones, gates `units` apart; null where nothing is saved
  int64_t units;            // H
  float* carry;             // lstm: c; gru: h
  float* cells;             // lstm: c, saved; may be null
  T* hidden;                // h, or, before a projection, o tanh(c)
  operand_of<T>* operand;   // the same for the next product
};

// What a row reads and writes in the backward pass.
template <class T>
struct BackwardRow {
  const T* grad_output;  // of h; may be null
  float* carry_h;        // read: gradient of h from the next step; written: what reaches h past the product
  float* carry_c;        // lstm: gradient of c
  const T* gates;        // saved, gates `units` apart
  const float* cell;     // lstm: c after this step
  const float* cell_before;
  const T* hidden;         // rnn: h after this step
  const T* hidden_before;  // gru: h before this step
  T* grad_gates;           // gates `units` apart; gru: hidden side's n, r, z, input side's n
  int64_t units;
  operand_of<T>* operand;  // the hidden side's for the next product, gates `units` apart
  float* sums;             // over rows, of grad_gates; gates `shard_units` apart
  int64_t shard_units;
};

// Calls body(unit, mask) for all units, LANES at a time.
template <class Body>
ALWAYS_INLINE void for_lanes(int64_t units, Body&& body) {
  int64_t unit = 0;
  for (; unit + LANES <= units; unit += LANES) body(unit, first_lanes(LANES));
  if (unit < units) body(unit, first_lanes(units - unit));
}

// Rounds to the element type, keeps the rounded value for the next product.
template <class T>
ALWAYS_INLINE void store_hidden(T* hidden, operand_of<T>* operand, Vec value, Mask mask) {
  store(hidden, value, mask);
  if constexpr (std::is_same_v<T, operand_of<T>>)
    store(operand, value, mask);
  else
    store(operand, load(hidden, mask), mask);
}

template <Mode MODE, class T>
ALWAYS_INLINE void step_forward(const ForwardRow<T>& row, int64_t count) {
  for_lanes(count, [&](int64_t u, Mask mask) {
    const auto hidden_side = [&](int gate) {
      return load(row.hidden_side + gate * row.shard_units + u, mask);
    };
    const auto input_side = [&](int gate) { return load(row.input_side + gate * row.units + u, mask); };
    const auto sum_of = [&](int gate) { return add(input_side(gate), hidden_side(gate)); };
    const auto save = [&](int gate, Vec value) { store(row.gates + gate * row.units + u, value, mask); };
    Vec hidden;
    if constexpr (MODE == Mode::lstm) {
      const Vec i = sigmoid_of<T>(sum_of(0)), f = sigmoid_of<T>(sum_of(1));
      const Vec g = hyperbolic_tangent_of<T>(sum_of(2)), o = sigmoid_of<T>(sum_of(3));
      const Vec c = fma(f, load(row.carry + u, mask), mul(i, g));
      store(row.carry + u, c, mask);
      hidden = mul(o, hyperbolic_tangent_of<T>(c));
      if (row.gates) {
        save(0, i);
        save(1, f);
        save(2, g);
        save(3, o);
      }
      if (row.cells) store(row.cells + u, c, mask);
    } else if constexpr (MODE == Mode::gru) {
      const Vec r = sigmoid_of<T>(sum_of(0)), z = sigmoid_of<T>(sum_of(1)), q = hidden_side(2);
      const Vec n = hyperbolic_tangent_of<T>(fma(r, q, input_side(2)));
      hidden = fma(z, sub(load(row.carry + u, mask), n), n);
      store(row.carry + u, hidden, mask);
      if (row.gates) {
        save(0, r);
        save(1, z);
        save(2, n);
        save(3, q);
      }
    } else {
      hidden = MODE == Mode::rnn_tanh ? hyperbolic_tangent_of<T>(sum_of(0)) : positive_part(sum_of(0));
    }
    store_hidden(row.hidden + u, row.operand + u, hidden, mask);
  });
}

template <Mode MODE, class T>
ALWAYS_INLINE void step_backward(const BackwardRow<T>& row, int64_t count) {
  for_lanes(count, [&](int64_t u, Mask mask) {
    const Vec one = broadcast(1.0f);
    const auto gate = [&](int index) { return load(row.gates + index * row.units + u, mask); };
    const auto write = [&](int index, Vec value, bool enters_product = true) {
      T* to = row.grad_gates + index * row.units + u;
      float* total = row.sums + index * row.shard_units + u;
      store(total, add(load(total, mask), value), mask);
      if (enters_product)
        store_hidden(to, row.operand + index * row.units + u, value, mask);
      else
        store(to, value, mask);
    };
    // Gradients of sigmoid(x) = s and tanh(x) = t.
    const auto through_sigmoid = [&](Vec grad, Vec s) { return mul(grad, mul(s, sub(one, s))); };
    const auto through_tanh = [&](Vec grad, Vec t) { return mul(grad, sub(one, mul(t, t))); };
    Vec grad = load(row.carry_h + u, mask);
    if (row.grad_output) grad = add(grad, load(row.grad_output + u, mask));
    if constexpr (MODE == Mode::lstm) {
      const Vec i = gate(0), f = gate(1), g = gate(2), o = gate(3);
      const Vec t = hyperbolic_tangent(load(row.cell + u, mask));
      const Vec grad_c = add(load(row.carry_c + u, mask), through_tanh(mul(grad, o), t));
      write(0, through_sigmoid(mul(grad_c, g), i));
      write(1, through_sigmoid(mul(grad_c, load(row.cell_before + u, mask)), f));
      write(2, through_tanh(mul(grad_c, i), g));
      write(3, through_sigmoid(mul(grad, t), o));
      store(row.carry_c + u, mul(grad_c, f), mask);
      store(row.carry_h + u, zero(), mask);
    } else if constexpr (MODE == Mode::gru) {
      const Vec r = gate(0), z = gate(1), n = gate(2), q = gate(3);
      const Vec grad_n = through_tanh(mul(grad, sub(one, z)), n);
      write(0, mul(grad_n, r));
      write(1, through_sigmoid(mul(grad_n, q), r));
      write(2, through_sigmoid(mul(grad, sub(load(row.hidden_before + u, mask), n)), z));
      write(3, grad_n, false);
      store(row.carry_h + u, mul(grad, z), mask);
    } else {
      const Vec h = load(row.hidden + u, mask);
      write(0, MODE == Mode::rnn_tanh ? through_tanh(grad, h) : where_positive(h, grad));
      store(row.carry_h + u, zero(), mask);
    }
  });
}

}  // namespace pyarch

"""Gates of the recurrent cells, forward and backward: the only place in this folder that writes them.

LSTM (Hochreiter and Schmidhuber, Neural Computation 9(8), 1997; forget gate: Gers, Schmidhuber and Cummins,
2000), torch's gate order i f g o:

    c = f * c_prev + i * g          i, f, o = sigmoid(pre)    g = tanh(pre)
    h = o * tanh(c)

GRU (Cho et al., 2014, arXiv:1406.1078, with the reset gate behind the product as in cuDNN), order r z n:

    n = tanh(pre_n + r * q)         r, z = sigmoid(pre)       q = W_hn h_prev + b_hn
    h = (1 - z) * n + z * h_prev

RNN (Elman, Cognitive Science 14(2), 1990): h = tanh(pre) or relu(pre).

Every argument and result is a float32 tile of one shape, element by element. pre_x is the whole input of a
gate before its function, biases included; pre_n is the input side alone. `d` before a name is its gradient.
sigmoid and tanh are finite for any finite or infinite input, and NaN for NaN alone.
"""

import triton
import triton.language as tl

# |x| below this takes tanh's series; above, the quotient of exponentials has lost no digit to cancellation.
TANH_SERIES = tl.constexpr(0.55)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), by an exponential that is never above 1."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1.0 + small)


@triton.jit
def tanh(x):
    """(1 - exp(-2|x|)) / (1 + exp(-2|x|)) with x's sign; near 0 a polynomial of relative error 1e-7."""
    small = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - small) / (1.0 + small)
    square = tl.minimum(x * x, 1.0)
    series = ((0.01645876 * square - 0.05268414) * square + 0.13320942) * square - 0.33332957
    near = x + x * (series * square)
    return tl.where(tl.abs(x) < TANH_SERIES, near, tl.where(x < 0, -quotient, quotient))


@triton.jit
def lstm_gates(pre_i, pre_f, pre_g, pre_o, c_prev):
    """One LSTM step: (i, f, g, o, c, h); h before any projection."""
    i = sigmoid(pre_i)
    f = sigmoid(pre_f)
    g = tanh(pre_g)
    o = sigmoid(pre_o)
    c = f * c_prev + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def lstm_gates_backward(i, f, g, o, c, c_prev, dh, dc):
    """Gradients (dpre_i, dpre_f, dpre_g, dpre_o, dc_prev) of `lstm_gates`, from those of h and of c."""
    tanh_c = tanh(c)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    dpre_i = dc * g * i * (1.0 - i)
    dpre_f = dc * c_prev * f * (1.0 - f)
    dpre_g = dc * i * (1.0 - g * g)
    dpre_o = dh * tanh_c * o * (1.0 - o)
    return dpre_i, dpre_f, dpre_g, dpre_o, dc * f


@triton.jit
def gru_gates(pre_r, pre_z, pre_n, q, h_prev):
    """One GRU step: (r, z, n, h)."""
    r = sigmoid(pre_r)
    z = sigmoid(pre_z)
    n = tanh(pre_n + r * q)
    return r, z, n, n + z * (h_prev - n)


@triton.jit
def gru_gates_backward(r, z, n, q, h_prev, dh):
    """Gradients (dpre_r, dpre_z, dpre_n, dq, dh_prev) of `gru_gates`; dh_prev without the products' part."""
    dpre_n = dh * (1.0 - z) * (1.0 - n * n)
    dpre_z = dh * (h_prev - n) * z * (1.0 - z)
    dpre_r = dpre_n * q * r * (1.0 - r)
    return dpre_r, dpre_z, dpre_n, dpre_n * r, dh * z


@triton.jit
def rnn_gates(pre, RELU: tl.constexpr):
    """One RNN step: h."""
    if RELU:
        h = tl.where(pre < 0, 0.0, pre)
    else:
        h = tanh(pre)
    return h


@triton.jit
def rnn_gates_backward(h, dh, RELU: tl.constexpr):
    """Gradient dpre of `rnn_gates`, from the output h alone."""
    if RELU:
        dpre = tl.where(h <= 0, 0.0, dh)
    else:
        dpre = dh * (1.0 - h * h)
    return dpre

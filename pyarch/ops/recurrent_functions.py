"""The public recurrent functions: what torch.nn's layers and cells compute, as functions of their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pyarch.dispatch import requested_backend
from pyarch.ops.recurrent import run, run_cell
from pyarch.ops.recurrent_call import count_of_weights

NONLINEARITIES = ("tanh", "relu")


# -------------------------------------------------------------------------------- layers


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    proj_size: int = 0,
    lengths: Tensor | Sequence[int] | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory over whole sequences, as torch.nn.LSTM.

    i, f, o = sigmoid(s), g = tanh(s), s = W_ih x + b_ih + W_hh h + b_hh; c' = f c + i g; h' = o tanh(c'),
    with a projection h' = W_hr (o tanh(c')). Hochreiter and Schmidhuber, 1997, Neural Computation 9(8);
    projection: Sak et al., 2014, arXiv:1402.1128.

    Args:
        input: (T, B, I); float32, bfloat16 and float16 run on our kernels, other dtypes on torch's own. Any
            strides. T steps, at least 1; B sequences, also 0.
        hx: h0 (L D, B, P) and c0 (L D, B, H), or None for zeros. L layers, D directions, H hidden size, P
            proj_size or H; layer by layer, forward direction first.
        params: for each layer and direction, in torch's order, weight_ih (4 H, I or D P), weight_hh (4 H, P),
            then bias_ih and bias_hh (4 H,) or neither, then weight_hr (P, H) with proj_size. Gates in the
            order i f g o.
        num_layers: L; a layer reads the output of the one before.
        bidirectional: whether a second direction runs from each sequence's last step to its first.
        dropout: probability with which values between layers are zeroed, when `training`.
        training: see dropout.
        proj_size: P of the projection, 0 for none.
        lengths: (B,) integers from 1 to T in any order, on the CPU: how many steps of each sequence count.
        recompute: save no gates for the backward, which makes them again: less memory, more time.

    Returns:
        output (T, B, D P), zero beyond each length; h_n (L D, B, P) and c_n (L D, B, H), after each
        sequence's last step and, for the reverse direction, its first. All in the input's dtype.

    Raises:
        RuntimeError, ValueError, TypeError: as torch's own operator, in its words.
        ValueError: proj_size or lengths that do not fit.
        NotImplementedError: a backend asked for by name refuses the call.
    """
    width = params[1].shape[1]
    projects = count_of_weights(params, num_layers, bidirectional) in (3, 5)
    if proj_size != (width if projects else 0):
        given = (
            f"weight_hr of width {width}, pass proj_size={width}" if projects else "no weight_hr among params"
        )
        raise ValueError(f"lstm: proj_size={proj_size}, but there is {given}")
    settings = dict(num_layers=num_layers, bidirectional=bidirectional, dropout=dropout, training=training)
    return _layers("lstm", input, hx, params, lengths, recompute, settings)


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent units over whole sequences, as torch.nn.GRU.

    r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh); n = tanh(W_in x + b_in + r (W_hn h + b_hn));
    h' = (1 - z) n + z h. Cho et al., 2014, arXiv:1406.1078.

    Args:
        input: (T, B, I), as of `lstm`.
        hx: h0 (L D, B, H) or None for zeros.
        params: for each layer and direction weight_ih (3 H, I or D H), weight_hh (3 H, H), then bias_ih and
            bias_hh (3 H,) or neither. Gates in the order r z n.
        num_layers, bidirectional, dropout, training, lengths, recompute: as of `lstm`.

    Returns:
        output (T, B, D H), zero beyond each length, and h_n (L D, B, H), in the input's dtype.

    Raises:
        As `lstm`.
    """
    settings = dict(num_layers=num_layers, bidirectional=bidirectional, dropout=dropout, training=training)
    return _layers("gru", input, hx, params, lengths, recompute, settings)


def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """An Elman network over whole sequences, as torch.nn.RNN.

    h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of it. Elman, 1990, Cognitive Science 14(2).

    Args:
        input: (T, B, I), as of `lstm`.
        hx: h0 (L D, B, H) or None for zeros.
        params: for each layer and direction weight_ih (H, I or D H), weight_hh (H, H), then bias_ih and
            bias_hh (H,) or neither.
        nonlinearity: "tanh" or "relu".
        num_layers, bidirectional, dropout, training, lengths: as of `lstm`.
        recompute: without effect, because nothing but the output is saved.

    Returns:
        output (T, B, D H), zero beyond each length, and h_n (L D, B, H), in the input's dtype.

    Raises:
        As `lstm`; ValueError for another nonlinearity.
    """
    settings = dict(num_layers=num_layers, bidirectional=bidirectional, dropout=dropout, training=training)
    return _layers(f"rnn_{_checked(nonlinearity)}", input, hx, params, lengths, recompute, settings)


def _layers(mode, input, hx, params, lengths, recompute, settings) -> tuple[Tensor, ...]:
    """The whole of `lstm`, `gru` and `rnn`: zero states, packing, the stack, padding."""
    steps, batch, _ = input.shape
    if hx is None:
        directions = settings["num_layers"] * (2 if settings["bidirectional"] else 1)
        shapes = _state_shapes(mode, params, (directions, batch))
        hx = tuple(input.new_zeros(shape) for shape in shapes)
    elif mode != "lstm":
        hx = (hx,)
    settings = dict(settings, backend=requested_backend(), recompute=recompute)
    if lengths is None:
        results = run(mode, input, hx, params, None, **settings)
        return results if mode == "lstm" else results[:2]
    lengths = torch.as_tensor(lengths)
    if lengths.shape != (batch,) or batch == 0 or lengths.min() < 1 or lengths.max() > steps:
        raise ValueError(f"lengths={lengths.tolist()}, needs {batch} integers from 1 to {steps}")
    packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
    sorted_states = [state.index_select(1, packed.sorted_indices) for state in hx]
    rows, *states = run(mode, packed.data, sorted_states, params, packed.batch_sizes, **settings)
    output, _ = pad_packed_sequence(PackedSequence(rows, *packed[1:]), total_length=steps)
    unsorted = [state.index_select(1, packed.unsorted_indices) for state in states if state is not None]
    return output, *unsorted


def _state_shapes(mode: str, params: Sequence[Tensor], leading: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shape of h0, and of an lstm's c0."""
    gates, width = params[1].shape
    return [(*leading, width), (*leading, gates // 4)] if mode == "lstm" else [(*leading, width)]


# -------------------------------------------------------------------------------- cells


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of `lstm`, as torch.nn.LSTMCell.

    Args:
        input: (B, I) or (I,); dtypes as of `lstm`.
        hx: h and c, each (B, H) or (H,), or None for zeros.
        weight_ih: (4 H, I). weight_hh: (4 H, H). bias_ih, bias_hh: (4 H,) or both None.

    Returns:
        h' and c', each (B, H) or (H,), in the input's dtype.

    Raises:
        As `lstm`.
    """
    return _cell("lstm", input, hx, (weight_ih, weight_hh, bias_ih, bias_hh))


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    """One step of `gru`, as torch.nn.GRUCell.

    Args:
        input: (B, I) or (I,); dtypes as of `lstm`.
        hx: (B, H) or (H,), or None for zeros.
        weight_ih: (3 H, I). weight_hh: (3 H, H). bias_ih, bias_hh: (3 H,) or both None.

    Returns:
        h', (B, H) or (H,), in the input's dtype.

    Raises:
        As `lstm`.
    """
    return _cell("gru", input, hx, (weight_ih, weight_hh, bias_ih, bias_hh))[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of `rnn`, as torch.nn.RNNCell.

    Args:
        input: (B, I) or (I,); dtypes as of `lstm`.
        hx: (B, H) or (H,), or None for zeros.
        weight_ih: (H, I). weight_hh: (H, H). bias_ih, bias_hh: (H,) or both None.
        nonlinearity: "tanh" or "relu".

    Returns:
        h', (B, H) or (H,), in the input's dtype.

    Raises:
        As `lstm`; ValueError for another nonlinearity.
    """
    return _cell(f"rnn_{_checked(nonlinearity)}", input, hx, (weight_ih, weight_hh, bias_ih, bias_hh))[0]


def _cell(mode, input, hx, weights) -> tuple[Tensor, ...]:
    if hx is None:
        hx = tuple(input.new_zeros(shape) for shape in _state_shapes(mode, weights, input.shape[:-1]))
    elif mode != "lstm":
        hx = (hx,)
    given = weights[:2] if weights[2] is None and weights[3] is None else weights
    return run_cell(mode, input, hx, given, requested_backend())


def _checked(nonlinearity: str) -> str:
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity={nonlinearity!r}, needs one of {', '.join(NONLINEARITIES)}")
    return nonlinearity

"""RNN, LSTM and GRU that run whole sequences on pyarch's kernels.

Constructor, parameters, state_dict, repr, errors and results are torch's. A good call is recognised by types,
shapes and dtypes; every other one, and what the kernels do not carry (float64, torch.jit.trace), goes to
torch's own forward, which computes it or raises in its own words.

Two limits: torch.compile takes these classes into a graph, as torch's own, only under
`torch._dynamo.config.allow_rnn = True`, and breaks the graph around them without.
`torch.ao.quantization.quantize_dynamic` finds layers by exact type and passes swapped ones by: restore first.
"""

from __future__ import annotations

from numbers import Integral
from operator import is_
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyarch.dispatch import Verdict
from pyarch.nn.drop_in import DropIn, left_to_torch
from pyarch.ops import recurrent

MODES = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}


class _RecurrentDropIn(DropIn):
    """The one computation of the three classes."""

    def _run_on_kernels(self, input, hx):
        weights = _present_weights(self)
        like = None if weights is None else _likeness(self, input, hx, weights)
        if recurrent.decided.get(like) is not None:
            call = _read_again(self, input, hx)
        else:
            call = None if weights is None else _read(self, input, hx)
            if call is None or not _agree_in_dtype(call.rows, weights[0]):
                return super().forward(input, hx)
        output, h_n, c_n = recurrent.run(
            MODES[self.mode],
            call.rows,
            call.states,
            weights,
            call.batch_sizes,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            backend=self.requested_backend(),
            recompute=self.pyarch_config.recompute,
            like=like,
        )
        states = h_n if c_n is None else (h_n, c_n)
        if call.batch_sizes is not None:
            # Whatever else the sequence says, such as its order, holds for the output too.
            return PackedSequence(output, *input[1:]), self.permute_hidden(states, input.unsorted_indices)
        if input.dim() == 3:
            return output.transpose(0, 1) if self.batch_first else output, states
        return output.squeeze(1), h_n.squeeze(1) if c_n is None else (h_n.squeeze(1), c_n.squeeze(1))

    def explain(self, *inputs) -> dict[str, tuple[Verdict, ...]]:
        """What each backend says of a call on `input, hx=None`, for "forward" and "backward"."""
        call = _read(self, *inputs)
        if call is None:
            return left_to_torch(_described(inputs[0]))
        return recurrent.explain(
            MODES[self.mode],
            call.rows,
            call.states,
            self._flat_weights,
            call.batch_sizes,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
        )


class RNN(_RecurrentDropIn, torch.nn.RNN):
    __doc__ = torch.nn.RNN.__doc__

    def forward(self, input, hx=None):
        return self._run_on_kernels(input, hx)


class LSTM(_RecurrentDropIn, torch.nn.LSTM):
    __doc__ = torch.nn.LSTM.__doc__

    def forward(self, input, hx=None):
        return self._run_on_kernels(input, hx)


class GRU(_RecurrentDropIn, torch.nn.GRU):
    __doc__ = torch.nn.GRU.__doc__

    def forward(self, input, hx=None):
        return self._run_on_kernels(input, hx)


# -------------------------------------------------------------------------------- reading a call


class _Call(NamedTuple):
    """A good call as the operator takes it: rows (T, B, I) or packed (N, I), states (L*D, B, *)."""

    rows: Tensor
    states: tuple[Tensor, ...]
    batch_sizes: Tensor | None


def _read(module: torch.nn.RNNBase, input, hx=None) -> _Call | None:
    """The call as the operator takes it, or None where torch's own forward answers it."""
    if torch.jit.is_tracing() or not _is_well_typed(module):
        return None
    if isinstance(input, PackedSequence):
        return _read_packed(module, input, hx)
    if not isinstance(input, Tensor) or input.dim() not in (2, 3):
        return None
    if input.dim() == 2:
        rows, batch = input.unsqueeze(1), ()
    else:
        rows = input.transpose(0, 1) if module.batch_first else input
        batch = rows.shape[1:2]
    if not _fits(module, rows) or rows.shape[0] == 0:
        return None
    states = states_of(hx, _shapes(module, batch), rows)
    if states is None:
        return None
    return _Call(rows, states if batch else tuple(state.unsqueeze(1) for state in states), None)


def _likeness(module: torch.nn.RNNBase, input, hx, weights: list[Tensor]) -> tuple | None:
    """What a call on plain tensors has in common with those that were read and decided as it is, or None."""
    given = plain_tensors(input, hx)
    if given is None or not _is_well_typed(module):
        return None
    return recurrent.likeness(
        (*given, *weights),
        MODES.get(module.mode),
        module.requested_backend(),
        type(hx),
        module.num_layers,
        module.bidirectional,
        module.batch_first,
        module.input_size,
        module.hidden_size,
        module.proj_size,
    )


def plain_tensors(input, hx) -> tuple | None:
    """(input, *states) where both look like tensors, or states are a tuple, and nothing traces; else None."""
    if torch.jit.is_tracing():
        return None
    if hx is None:
        return (input,)
    return (input, *hx) if type(hx) is tuple else (input, hx)


def _read_again(module: torch.nn.RNNBase, input: Tensor, hx) -> _Call:
    """A call that is like one read before."""
    batched = input.dim() == 3
    rows = input.unsqueeze(1) if not batched else input.transpose(0, 1) if module.batch_first else input
    states = (hx,) if isinstance(hx, Tensor) else hx
    if states is None:
        states = zeros_of(_shapes(module, (rows.shape[1],)), rows)
    elif not batched:
        states = tuple(state.unsqueeze(1) for state in states)
    return _Call(rows, states, None)


def _read_packed(module: torch.nn.RNNBase, input: PackedSequence, hx) -> _Call | None:
    """The same for a packed sequence; given states are put in the order that it was sorted to."""
    rows, batch_sizes, order, _ = input
    if rows.dim() != 2 or not _fits(module, rows) or batch_sizes.dim() != 1 or len(batch_sizes) == 0:
        return None
    batch = (batch_sizes[0].item(),)
    states = states_of(hx, _shapes(module, batch), rows)
    if states is None or (order is not None and order.shape != batch):
        return None
    if hx is not None and order is not None:
        states = tuple(state.index_select(1, order) for state in states)
    return _Call(rows, states, batch_sizes)


def _is_well_typed(module: torch.nn.RNNBase) -> bool:
    """Whether torch's operators take the layer's settings; its constructor takes others too."""
    layers = type(module.num_layers)
    return type(module.bidirectional) is bool and layers is not bool and issubclass(layers, Integral)


def _fits(module: torch.nn.RNNBase, rows: Tensor) -> bool:
    return rows.shape[-1] == module.input_size and has_kernel_kind(rows) and module.mode in MODES


def has_kernel_kind(input: Tensor) -> bool:
    """Whether an input holds numbers of a dtype that the kernels know."""
    return input.dtype in recurrent.KERNEL_DTYPES and not input.is_meta


def _shapes(module: torch.nn.RNNBase, batch: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shape of h0, and of an LSTM's c0."""
    layers = (2 if module.bidirectional else 1) * module.num_layers
    shapes = [(layers, *batch, module.proj_size or module.hidden_size)]
    return [*shapes, (layers, *batch, module.hidden_size)] if module.mode == "LSTM" else shapes


def states_of(hx, shapes: list[tuple[int, ...]], like: Tensor) -> tuple[Tensor, ...] | None:
    """The states that a call gives: a tensor of the one shape, or a pair of tensors of the two.

    Zeros where `hx` is None; None where it is anything else.
    """
    if hx is None:
        return zeros_of(shapes, like)
    given = (hx,) if len(shapes) == 1 else hx
    if not isinstance(given, tuple | list) or len(given) != len(shapes):
        return None
    for state, shape in zip(given, shapes, strict=True):
        if not isinstance(state, Tensor) or state.shape != shape:
            return None
    return tuple(given)


def zeros_of(shapes: list[tuple[int, ...]], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in shapes)


def _described(input) -> str:
    rows = input.data if isinstance(input, PackedSequence) else input
    return f"{rows.dtype} input {tuple(rows.shape)}"


# -------------------------------------------------------------------------------- weights


def _present_weights(module: torch.nn.RNNBase) -> list[Tensor] | None:
    """`_flat_weights` brought up to date, or None where a weight is missing.

    Unless something replaced them they are the registered parameters: a quick form of what torch's
    `_update_flat_weights` looks for through attributes and weak references.
    """
    registered = map(module._parameters.get, module._flat_weights_names)
    if torch.compiler.is_compiling() or not all(map(is_, registered, module._flat_weights)):
        module._update_flat_weights()
    return None if NoneType in map(type, module._flat_weights) else module._flat_weights


def _agree_in_dtype(rows: Tensor, weight: Tensor) -> bool:
    """torch's own condition, which it checks beside the shapes."""
    return rows.dtype == weight.dtype or torch._C._is_any_autocast_enabled()

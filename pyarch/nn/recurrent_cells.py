"""RNNCell, LSTMCell and GRUCell: one step of a recurrent layer as one fused call.

Constructor, parameters, state_dict, repr, errors and results are torch's. A good call is recognised by types,
shapes and dtypes; every other one, and what the kernels do not carry (float64, torch.jit.trace), goes to
torch's own forward, which computes it or raises in its own words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyarch.dispatch import Verdict
from pyarch.nn.drop_in import DropIn, left_to_torch
from pyarch.nn.recurrent import has_kernel_kind, plain_tensors, states_of, zeros_of
from pyarch.ops import recurrent


class _CellDropIn(DropIn):
    """The one computation of the three classes."""

    def _run_on_kernels(self, input, hx):
        mode, backend, weights = _mode(self), self.requested_backend(), _weights(self)
        given, sizes = plain_tensors(input, hx), (self.input_size, self.hidden_size)
        like = given and recurrent.likeness((*given, *weights), mode, backend, type(hx), *sizes)
        if recurrent.decided.get(like) is not None:
            states = _states_again(self, input, hx)
        else:
            states = _states(self, input, hx)
            if states is None:
                return super().forward(input, hx)
        new = recurrent.run_cell(mode, input, states, weights, backend, like)
        return new if len(new) > 1 else new[0]

    def explain(self, *inputs) -> dict[str, tuple[Verdict, ...]]:
        """What each backend says of a call on `input, hx=None`, for "forward" and "backward"."""
        states = _states(self, *inputs)
        if states is None:
            return left_to_torch(f"{inputs[0].dtype} input {tuple(inputs[0].shape)}")
        return recurrent.explain_cell(_mode(self), inputs[0], states, _weights(self))


class RNNCell(_CellDropIn, torch.nn.RNNCell):
    __doc__ = torch.nn.RNNCell.__doc__

    def forward(self, input, hx=None):
        return self._run_on_kernels(input, hx)


class LSTMCell(_CellDropIn, torch.nn.LSTMCell):
    __doc__ = torch.nn.LSTMCell.__doc__

    def forward(self, input, hx=None):
        return self._run_on_kernels(input, hx)


class GRUCell(_CellDropIn, torch.nn.GRUCell):
    __doc__ = torch.nn.GRUCell.__doc__

    def forward(self, input, hx=None):
        return self._run_on_kernels(input, hx)


# -------------------------------------------------------------------------------- reading a call


def _mode(cell: torch.nn.RNNCellBase) -> str:
    """The operator's name of this cell."""
    if isinstance(cell, torch.nn.LSTMCell):
        return "lstm"
    return "gru" if isinstance(cell, torch.nn.GRUCell) else f"rnn_{cell.nonlinearity}"


_IN_ORDER = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_NAMES = frozenset(_IN_ORDER)


def _weights(cell: torch.nn.RNNCellBase) -> list[Tensor]:
    parameters = cell._parameters
    # Found without a way through attributes; where something replaced one, it is not among them.
    if not torch.compiler.is_compiling() and cell.bias and _NAMES <= parameters.keys():
        return list(map(parameters.__getitem__, _IN_ORDER))
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    return weights if cell.bias else weights[:2]


def _states(cell: torch.nn.RNNCellBase, input, hx=None) -> tuple[Tensor, ...] | None:
    """h0, for an LSTM also c0, each (*batch, H), or None where torch's own forward answers the call."""
    if torch.jit.is_tracing() or not isinstance(input, Tensor) or input.dim() not in (1, 2):
        return None
    if input.shape[-1] != cell.input_size or not has_kernel_kind(input):
        return None
    if getattr(cell, "nonlinearity", "tanh") not in ("tanh", "relu"):
        return None
    shape = *input.shape[:-1], cell.hidden_size
    return states_of(hx, [shape] * _count_of_states(cell), input)


def _states_again(cell: torch.nn.RNNCellBase, input: Tensor, hx) -> tuple[Tensor, ...]:
    """The same for a call that is like one read before."""
    if hx is None:
        return zeros_of([(*input.shape[:-1], cell.hidden_size)] * _count_of_states(cell), input)
    return (hx,) if isinstance(hx, Tensor) else hx


def _count_of_states(cell: torch.nn.RNNCellBase) -> int:
    return 2 if isinstance(cell, torch.nn.LSTMCell) else 1

"""The public recurrent functions by mode, and torch's layers to hold them against."""

from __future__ import annotations

from pyarch import dispatch, ops
from tests.recurrent_models import STOCK

FUNCTIONS = {"lstm": ops.lstm, "gru": ops.gru, "rnn_tanh": ops.rnn, "rnn_relu": ops.rnn}
CELLS = {"lstm": ops.lstm_cell, "gru": ops.gru_cell, "rnn_tanh": ops.rnn_cell, "rnn_relu": ops.rnn_cell}


def extra(mode):
    return {"nonlinearity": mode.removeprefix("rnn_")} if mode.startswith("rnn") else {}


def stock_layer(mode, inputs=4, hidden=6, **settings):
    return STOCK[mode][0](inputs, hidden, **extra(mode), **settings)


def flat(results):
    """The tensors of (output, h_n) or (output, (h_n, c_n))."""
    output, states = results
    return [output, *(states if isinstance(states, tuple) else (states,))]


def recorded(function):
    """What a function returns and every (operator, backend) chosen meanwhile."""
    seen = []
    with dispatch.recording(lambda op, call, chosen: seen.append((op.name, chosen.name))):
        return function(), seen

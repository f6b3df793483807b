"""The public recurrent functions are torch's layers and cells: values, gradients, errors, compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyarch
from pyarch import ops
from tests.recurrent_functions import CELLS, FUNCTIONS, extra, flat, recorded, stock_layer
from tests.recurrent_models import STOCK, close, each_backend, each_mode

OPERATOR = "recurrent"


@each_backend
@pytest.mark.parametrize("lengths", [None, [2, 5, 1, 5], torch.tensor([1, 1, 1, 1])], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@each_mode
def test_recurrent_functions_are_torchs_layers(backend, mode, bidirectional, lengths):
    settings = dict(num_layers=2, bidirectional=bidirectional)
    layer = stock_layer(mode, **settings)
    x = torch.randn(5, 4, 4)
    shape = 2 * (1 + bidirectional), 4, 6
    hx = (torch.randn(shape), torch.randn(shape)) if mode == "lstm" else torch.randn(shape)
    for state in (hx, None):
        with pyarch.backend(backend):
            ours = FUNCTIONS[mode](x, state, layer._flat_weights, lengths=lengths, **settings, **extra(mode))
        if lengths is None:
            expected = flat(layer(x, state))
        else:
            rows, states = layer(
                pack_padded_sequence(x, torch.as_tensor(lengths), enforce_sorted=False), state
            )
            expected = flat((pad_packed_sequence(rows, total_length=5)[0], states))
        cotangents = [torch.randn_like(each) for each in expected]
        for mine, theirs in zip(ours, expected, strict=True):
            close(mine, theirs)
        for mine, theirs in zip(
            torch.autograd.grad(ours, layer._flat_weights, cotangents),
            torch.autograd.grad(expected, layer._flat_weights, cotangents),
            strict=True,
        ):
            close(mine, theirs)


@each_backend
def test_recurrent_function_with_projection_and_dropout(backend):
    layer = stock_layer("lstm", num_layers=3, proj_size=2, dropout=0.5)
    x = torch.randn(5, 3, 4)
    torch.manual_seed(1)
    expected = flat(layer(x))
    torch.manual_seed(1)
    with pyarch.backend(backend):
        ours = ops.lstm(x, None, layer._flat_weights, num_layers=3, dropout=0.5, training=True, proj_size=2)
        still = ops.lstm(x, None, layer._flat_weights, num_layers=3, dropout=0.5, proj_size=2)
    for mine, theirs in zip(ours, expected, strict=True):
        close(mine, theirs)
    close(still[0], layer.eval()(x)[0])


@each_backend
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (4,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@each_mode
def test_recurrent_cell_functions_are_torchs_cells(backend, mode, bias, shape):
    cell = getattr(nn, f"{STOCK[mode][0].__name__}Cell")(4, 6, bias=bias, **extra(mode))
    x, state = torch.randn(shape), torch.randn(*shape[:-1], 6)
    for hx in ((state, state + 1) if mode == "lstm" else state, None):
        with pyarch.backend(backend):
            ours = CELLS[mode](x, hx, *cell.parameters(), **extra(mode))
        theirs = cell(x, hx)
        for mine, expected in zip(
            *(each if mode == "lstm" else (each,) for each in (ours, theirs)), strict=True
        ):
            close(mine, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(proj_size=3), "proj_size=3, but there is no weight_hr among params"),
        (dict(lengths=[5, 5]), r"lengths=\[5, 5\], needs 3 integers from 1 to 5"),
        (dict(lengths=[5, 0, 1]), r"lengths=\[5, 0, 1\], needs 3 integers from 1 to 5"),
        (dict(lengths=[5, 6, 1]), r"lengths=\[5, 6, 1\], needs 3 integers from 1 to 5"),
    ],
    ids=str,
)
def test_recurrent_function_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        ops.lstm(torch.randn(5, 3, 4), None, stock_layer("lstm")._flat_weights, **settings)


def test_recurrent_function_asks_for_the_proj_size_it_sees():
    weights = stock_layer("lstm", proj_size=2)._flat_weights
    with pytest.raises(ValueError, match="weight_hr of width 2, pass proj_size=2"):
        ops.lstm(torch.randn(5, 3, 4), None, weights)


@pytest.mark.parametrize("function", [ops.rnn, ops.rnn_cell])
def test_recurrent_function_errors_name_the_nonlinearities(function):
    weights = stock_layer("rnn_tanh")._flat_weights
    given = (weights,) if function is ops.rnn else weights
    with pytest.raises(ValueError, match="nonlinearity='gelu', needs one of tanh, relu"):
        function(torch.randn(5, 3, 4), None, *given, nonlinearity="gelu")


def test_recurrent_what_no_kernel_carries_is_torchs_with_its_errors():
    layer = stock_layer("gru")
    x, h0 = torch.randn(5, 3, 4), torch.randn(1, 3, 6)
    (output, _), seen = recorded(lambda: ops.gru(x.double(), h0.double(), layer.double()._flat_weights))
    assert output.dtype == torch.float64 and not seen
    weights = layer.float()._flat_weights
    for wrong in ((x[..., :3], h0), (x, h0[..., :5]), (x.half(), h0), (x, h0.repeat(2, 1, 1))):
        texts = []
        for call in (
            lambda wrong=wrong: ops.gru(*wrong, weights),
            lambda wrong=wrong: torch._VF.gru(*wrong, weights, True, 1, 0.0, False, False, False),
        ):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                call()
            texts.append(str(caught.value))
        assert texts[0] == texts[1]


@each_backend
@each_mode
def test_recurrent_functions_compile_whole_with_dynamic_shapes(backend, mode):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = stock_layer(mode, num_layers=2, bidirectional=True)
    settings = dict(num_layers=2, bidirectional=True, **extra(mode))

    def loss(x, *weights):
        return FUNCTIONS[mode](torch.relu(x), None, weights, **settings)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with pyarch.backend(backend):
        for steps in (5, 7):
            x = torch.randn(steps, 3, 4)
            mine = torch.autograd.grad(compiled(x, *layer._flat_weights), layer._flat_weights)
            theirs = torch.autograd.grad(layer(x.relu())[0].square().sum(), layer._flat_weights)
            for got, expected in zip(mine, theirs, strict=True):
                close(got, expected, 1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2

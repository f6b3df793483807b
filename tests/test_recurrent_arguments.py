"""pyarch.nn's recurrent layers take and refuse what torch's do, in its words; torch's own module inputs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import pyarch
from tests.recurrent_models import drop_in, each_backend

OPERATOR = "recurrent"
NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
LAYERS = NAMES[:3]
each_layer = pytest.mark.parametrize("name", LAYERS)


def said(run) -> tuple[str, str]:
    """The type and text of the error that a call must raise."""
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error)
    return "no error", ""


def classes(name: str) -> tuple[type[nn.Module], type[nn.Module]]:
    """Ours and torch's."""
    return drop_in(getattr(nn, name)), getattr(nn, name)


def pairs(name: str, *arguments, **settings) -> tuple[nn.Module, nn.Module]:
    """Our layer and torch's with the same numbers."""
    ours, stock = (cls(*arguments, **settings) for cls in classes(name))
    ours.load_state_dict(stock.state_dict())
    return ours, stock


# ------------------------------------------------------------------------------------ constructors

CONSTRUCTIONS = {
    "dropout True": ((3, 4), {"dropout": True}),
    "dropout 2": ((3, 4), {"dropout": 2.0}),
    "dropout text": ((3, 4), {"dropout": "0.1"}),
    "bias 1": ((3, 4), {"bias": 1}),
    "hidden text": ((3, "4"), {}),
    "hidden 0": ((3, 0), {}),
    "hidden -1": ((3, -1), {}),
    "inputs 0": ((0, 4), {}),
    "layers 0": ((3, 4), {"num_layers": 0}),
    "projection below 0": ((3, 4), {"proj_size": -1}),
    "projection 2": ((3, 4), {"proj_size": 2}),
    "projection as wide as hidden": ((3, 4), {"proj_size": 4}),
    "nonlinearity": ((3, 4), {"nonlinearity": "sigmoid"}),
    "unknown": ((3, 4), {"depth": 3}),
    "nothing": ((), {}),
    "dropout of one layer": ((3, 4), {"dropout": 0.5}),
}


@pytest.mark.parametrize("case", CONSTRUCTIONS, ids=str)
@each_layer
def test_recurrent_constructor_refuses_as_torch(name, case):
    arguments, settings = CONSTRUCTIONS[case]
    outcomes = []
    for cls in classes(name):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            outcomes.append(
                (said(lambda cls=cls: cls(*arguments, **settings)), [str(w.message) for w in warned])
            )
    assert outcomes[0] == outcomes[1]


# ------------------------------------------------------------------------------------ calls

I, H = 3, 4  # noqa: E741


def state(name: str, *shapes, dtype=torch.float32):
    """hx of these shapes: h0 and c0 for an LSTM, h0 alone for the others."""
    tensors = tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)
    return tensors[: 1 + name.startswith("LSTM")] if name.startswith("LSTM") else tensors[0]


def nested(change, hx):
    """hx with every tensor changed."""
    return tuple(map(change, hx)) if isinstance(hx, tuple) else change(hx)


def packed(width=I, lengths=(3, 2)):
    return pack_padded_sequence(torch.zeros(max(lengths), len(lengths), width), lengths)


CALLS = {
    "no step": lambda layer, name: layer(torch.zeros(0, 2, I)),
    "no step, no batch": lambda layer, name: layer(torch.zeros(0, I)),
    "1-D": lambda layer, name: layer(torch.zeros(I)),
    "4-D": lambda layer, name: layer(torch.zeros(1, 2, 2, I)),
    "too wide": lambda layer, name: layer(torch.zeros(5, 2, I + 1)),
    "float64": lambda layer, name: layer(torch.zeros(5, 2, I, dtype=torch.float64)),
    "integers": lambda layer, name: layer(torch.zeros(5, 2, I, dtype=torch.long)),
    "batch of the state": lambda layer, name: layer(torch.zeros(5, 2, I), state(name, (1, 3, H), (1, 3, H))),
    "layers of the state": lambda layer, name: layer(torch.zeros(5, 2, I), state(name, (2, 2, H), (2, 2, H))),
    "width of the state": lambda layer, name: layer(torch.zeros(5, 2, I), state(name, (1, 2, 5), (1, 2, 5))),
    "2-D state of a batch": lambda layer, name: layer(torch.zeros(5, 2, I), state(name, (1, H), (1, H))),
    "3-D state, no batch": lambda layer, name: layer(torch.zeros(5, I), state(name, (1, 1, H), (1, 1, H))),
    "state of no batch, too many": lambda layer, name: layer(torch.zeros(5, I), state(name, (2, H), (2, H))),
    "float64 state": lambda layer, name: layer(
        torch.zeros(5, 2, I), state(name, (1, 2, H), (1, 2, H), dtype=torch.float64)
    ),
    "second state": lambda layer, name: layer(torch.zeros(5, 2, I), state(name, (1, 2, H), (1, 2, H + 1))),
    "no tensor": lambda layer, name: layer([[1.0]]),
    "None": lambda layer, name: layer(None),
    "nothing": lambda layer, name: layer(),
    "packed too wide": lambda layer, name: layer(packed(I + 1)),
    "packed, batch of the state": lambda layer, name: layer(packed(), state(name, (1, 3, H), (1, 3, H))),
    "packed, layers of the state": lambda layer, name: layer(packed(), state(name, (2, 2, H), (2, 2, H))),
    "packed, width of the state": lambda layer, name: layer(packed(), state(name, (1, 2, 5), (1, 2, 5))),
    "packed, 2-D state": lambda layer, name: layer(packed(), state(name, (1, H), (1, H))),
    "packed float64": lambda layer, name: layer(packed().to(torch.float64)),
    "packed of length 0": lambda layer, name: layer(packed(lengths=(3, 0))),
    "packed 3-D data": lambda layer, name: layer(PackedSequence(torch.zeros(2, 1, I), torch.tensor([1, 1]))),
    "packed, rows missing": lambda layer, name: layer(
        PackedSequence(torch.zeros(2, I), torch.tensor([2, 1]))
    ),
    "meta state": lambda layer, name: layer(
        torch.zeros(5, 2, I),
        tuple(torch.zeros(1, 2, H, device="meta") for _ in "hc")
        if name == "LSTM"
        else state(name, (1, 2, H)),
    ),
    "tensor or tuple swapped": lambda layer, name: layer(
        torch.zeros(5, 2, I), torch.zeros(1, 2, H) if name == "LSTM" else (torch.zeros(1, 2, H),) * 2
    ),
}


@each_backend
@pytest.mark.parametrize("case", CALLS)
@each_layer
def test_recurrent_calls_refuse_as_torch(backend, name, case):
    ours, stock = pairs(name, I, H)
    expected = said(lambda: CALLS[case](stock, name))
    with pyarch.backend(backend):
        assert said(lambda: CALLS[case](ours, name)) == expected


def test_recurrent_calls_that_are_refused_are_errors():
    """The table above compares errors: every row is one, on some layer."""
    for case in CALLS:
        assert any(
            said(lambda case=case, n=n: CALLS[case](getattr(nn, n)(I, H), n))[0] != "no error" for n in LAYERS
        ), case


TEXTS = {
    ("RNN", "no step"): "Expected sequence length to be larger than 0 in RNN",
    ("LSTM", "batch of the state"): "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]",
    ("GRU", "batch of the state"): "Expected hidden size (1, 2, 4), got [1, 3, 4]",
    ("RNN", "4-D"): "RNN: Expected input to be 2D or 3D, got 4D tensor instead",
    ("LSTM", "4-D"): "LSTM: Expected input to be 2D or 3D, got 4D instead",
    ("GRU", "packed of length 0"): "Length of all samples has to be greater than 0",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{"bidirectional": 1}, {"bidirectional": None}, {"bidirectional": []}, {"num_layers": True}],
    ids=str,
)
@each_layer
def test_recurrent_layers_of_settings_of_another_type_refuse_calls_as_torch(name, settings, packed):
    x = torch.randn(4, 2, 3)
    given = pack_padded_sequence(x, [4, 2]) if packed else x
    mine, theirs = (said(lambda cls=cls: cls(3, 4, **settings)(given)) for cls in classes(name))
    assert mine == theirs and theirs[0] == "TypeError"


@pytest.mark.parametrize("name, case", TEXTS, ids=str)
def test_recurrent_errors_name_what_is_wrong(name, case):
    ours, _ = pairs(name, I, H)
    assert TEXTS[name, case] in said(lambda: CALLS[case](ours, name))[1]


CELL_CALLS = {
    "3-D": lambda cell, name: cell(torch.zeros(1, 2, I)),
    "too wide": lambda cell, name: cell(torch.zeros(2, I + 1)),
    "width of the state": lambda cell, name: cell(torch.zeros(2, I), state(name, (2, 5), (2, 5))),
    "batch of the state": lambda cell, name: cell(torch.zeros(2, I), state(name, (3, H), (3, H))),
    "3-D state": lambda cell, name: cell(torch.zeros(2, I), state(name, (1, 2, H), (1, 2, H))),
    "1-D state of a batch": lambda cell, name: cell(torch.zeros(2, I), state(name, (H,), (H,))),
    "2-D state, no batch": lambda cell, name: cell(torch.zeros(I), state(name, (1, H), (1, H))),
    "float64": lambda cell, name: cell(torch.zeros(2, I, dtype=torch.float64)),
    "float64 state": lambda cell, name: cell(
        torch.zeros(2, I), state(name, (2, H), (2, H), dtype=torch.float64)
    ),
    "integers": lambda cell, name: cell(torch.zeros(2, I, dtype=torch.long)),
    "second state": lambda cell, name: cell(torch.zeros(2, I), state(name, (2, H), (2, H + 1))),
    "None": lambda cell, name: cell(None),
}


@each_backend
@pytest.mark.parametrize("case", CELL_CALLS)
@pytest.mark.parametrize("name", NAMES[3:])
def test_recurrent_cells_refuse_as_torch(backend, name, case):
    ours, stock = pairs(name, I, H)
    expected = said(lambda: CELL_CALLS[case](stock, name))
    with pyarch.backend(backend):
        assert said(lambda: CELL_CALLS[case](ours, name)) == expected


def test_recurrent_cell_of_an_unknown_nonlinearity():
    ours, stock = pairs("RNNCell", I, H, nonlinearity="softsign")
    assert said(lambda: ours(torch.zeros(2, I))) == said(lambda: stock(torch.zeros(2, I)))
    assert "Unknown nonlinearity: softsign" in said(lambda: ours(torch.zeros(2, I)))[1]


# ------------------------------------------------------------------------------------ torch's own inputs


def inputs_of(name, dtype):
    """Constructor and forward arguments that torch tests its own module with."""
    pytest.importorskip("expecttest", reason="torch's module inputs need the package expecttest")
    from torch.testing._internal.common_modules import module_db

    infos = [info for info in module_db if info.module_cls.__name__ == name]
    return [
        (info, each)
        for info in infos
        for training in (True, False)
        for each in info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training
        )
    ]


def leaves_of(value):
    """Every tensor inside nested tuples, PackedSequence included."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for each in value for leaf in leaves_of(each)] if isinstance(value, tuple) else []


def run(layer, arguments):
    """Outputs, and the gradients of inputs and parameters from random gradients of every output."""
    torch.manual_seed(1)
    outputs = [each for each in leaves_of(layer(*arguments.args, **arguments.kwargs)) if each.requires_grad]
    given = (*arguments.args, *arguments.kwargs.values())
    leaves = [each for each in [*leaves_of(given), *layer.parameters()] if each.requires_grad]
    grads = [torch.randn_like(each) for each in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads, allow_unused=True)]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_recurrent_on_torchs_module_inputs(backend, name, dtype):
    """Equal values, shapes, strides and dtypes; what torch refuses is refused in its words."""
    inputs = inputs_of(name, dtype)
    assert len(inputs) >= 4
    for info, each in inputs:
        constructor = each.constructor_input
        ours, stock = pairs(name, *constructor.args, **constructor.kwargs, dtype=dtype)
        with pyarch.backend(backend):
            mine = run(ours, each.forward_input)
        theirs = run(stock, each.forward_input)
        assert len(theirs) > 2, info.name
        for got, expected in zip(mine, theirs, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, check_stride=True)
        assert repr(ours) == repr(stock)


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_recurrent_torchs_error_inputs(backend, name):
    """The wrong calls that torch tests its own modules with."""
    pytest.importorskip("expecttest", reason="torch's module inputs need the package expecttest")
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

    info = next(info for info in module_db if info.module_cls.__name__ == name)
    if info.module_error_inputs_func is None:
        pytest.fail(f"torch has no error inputs for {name}")
    cases = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    for case in cases:
        each = case.module_error_input
        constructor = each.constructor_input
        if case.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            outcomes = [said(lambda c=c, k=constructor: c(*k.args, **k.kwargs)) for c in classes(name)]
        else:
            layers = pairs(name, *constructor.args, **constructor.kwargs)
            given = each.forward_input
            with pyarch.backend(backend):
                outcomes = [said(lambda layer=layer, g=given: layer(*g.args, **g.kwargs)) for layer in layers]
        assert outcomes[0] == outcomes[1] and outcomes[1][0] == case.error_type.__name__


def test_recurrent_number_of_layers_of_numpy_stays_on_our_kernels():
    layer = pyarch.nn.GRU(4, 8, np.int64(1))
    assert layer.explain(torch.randn(3, 2, 4)) == pyarch.nn.GRU(4, 8, 1).explain(torch.randn(3, 2, 4))

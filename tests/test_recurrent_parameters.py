"""The parameters of pyarch.nn's recurrent layers: names, sharing, layouts; their present values count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyarch
from tests.conv_cases import misaligned, sliced
from tests.recurrent_models import (
    Problem,
    answers,
    cases,
    each_backend,
    each_mode,
    features_first,
    hold,
    in_every_mode,
    outcome,
)

OPERATOR = "recurrent"


@each_backend
@pytest.mark.parametrize("layout", [features_first, sliced, misaligned])
@cases(*in_every_mode(bidirectional=True), Problem("lstm", proj=3), Problem("lstm", dtype=torch.bfloat16))
def test_recurrent_weights_of_any_layout(backend, problem, layout):
    layer = problem.ours()
    for parameter in layer.parameters():
        parameter.data = layout(parameter.data)
    with pyarch.backend(backend):
        results = outcome(problem, layer)
    hold(results, *answers(problem))


@each_backend
@each_mode
def test_recurrent_weights_shared_between_layers(backend, mode):
    """The gradient of a weight that two layers and two directions share is the sum over them."""
    problem = Problem(mode, inputs=12, hidden=6, layers=2, bidirectional=True)
    runs = []
    for layer, engine in ((problem.ours(), backend), (problem.stock(), "auto"), (problem.stock(), "auto")):
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            for place in ("l0_reverse", "l1", "l1_reverse"):
                setattr(layer, f"{kind}_{place}", getattr(layer, f"{kind}_l0"))
        arguments = problem.arguments()
        if runs and len(runs) == 2:
            layer, arguments = layer.double(), [each.double() for each in arguments]
        assert len(list(layer.parameters())) == 4
        with pyarch.backend(engine):
            runs.append(outcome(problem, layer, arguments))
    hold(*runs)


def scale_data(layer):
    for parameter in layer.parameters():
        parameter.data.mul_(1.5)


def add_in_place(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.25)


def replace_data(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data.flip(0).clone()


def load(layer):
    layer.load_state_dict({name: -2 * each for name, each in layer.state_dict().items()})


def replace_parameters(layer):
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter.detach() * 0.5))


def optimizer_step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for parameter in layer.parameters():
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter).to(parameter.dtype)
    optimizer.step()


def write_one_column(layer):
    with torch.no_grad():
        next(each for name, each in layer.named_parameters() if "weight_hh" in name)[:, -1] = 3


CHANGES = [
    scale_data,
    add_in_place,
    replace_data,
    load,
    replace_parameters,
    optimizer_step,
    write_one_column,
]


@each_backend
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@cases(
    *in_every_mode(hidden=40, batch=1),
    *(Problem(mode, hidden=20, dtype=torch.bfloat16) for mode in ("lstm", "gru", "rnn_tanh")),
    *in_every_mode(cell=True, batch=1),
    Problem("lstm", proj=3, layers=2, bidirectional=True),
)
def test_recurrent_weights_changed_between_two_calls(backend, problem, train, change):
    """Nothing computed from the weights of an earlier call is used again."""
    ours, stock = problem.ours(), problem.stock()
    arguments = problem.arguments()
    with pyarch.backend(backend), torch.set_grad_enabled(train):
        before = problem.call(ours, arguments)["h_n"]
        problem.call(ours, arguments)
        change(ours)
        after = problem.call(ours, arguments)
        change(stock)
        assert not torch.equal(before, after["h_n"])
        expected = problem.call(stock, arguments)
    tolerance = 1e-5 if problem.dtype == torch.float32 else 0.05
    for name in expected:
        torch.testing.assert_close(after[name], expected[name], rtol=tolerance, atol=tolerance)
    if train:
        with pyarch.backend(backend):
            mine = outcome(problem, ours)
        theirs = outcome(problem, stock)
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=10 * tolerance, atol=10 * tolerance)


@each_mode
def test_recurrent_parameters_have_torchs_names_and_order(mode):
    for problem in (
        Problem(mode, layers=2, bidirectional=True),
        Problem(mode, bias=False),
        *([Problem("lstm", proj=3, layers=2, bidirectional=True)] if mode == "lstm" else []),
    ):
        ours, stock = problem.ours(), problem.stock()
        shapes = [[(name, each.shape) for name, each in layer.named_parameters()] for layer in (ours, stock)]
        assert shapes[0] == shapes[1]
        assert ours._flat_weights_names == stock._flat_weights_names
        assert ours._all_weights == stock._all_weights
        assert [
            w is getattr(ours, n) for w, n in zip(ours._flat_weights, ours._flat_weights_names, strict=True)
        ]
        assert [[each.shape for each in group] for group in ours.all_weights] == [
            [each.shape for each in group] for group in stock.all_weights
        ]
        assert ours.flatten_parameters() is None
        assert repr(ours) == repr(stock)

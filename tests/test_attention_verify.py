"""verify and explain on attention and transformer layers: right kernels pass, each wrong number is named."""

from __future__ import annotations

import pytest
from torch import nn

import pyarch
from pyarch import dispatch, native
from pyarch.dispatch import Backend, Op, accepts_all
from pyarch.nn.config import Config
from pyarch.ops import attention, attention_autograd
from pyarch.reference import attention as reference
from tests.attention_modules_cases import (
    E,
    L,
    N,
    Translator,
    built,
    data,
    drawn,
    each_class,
    filled,
    hidden,
    operators_of,
    sentences,
    window_mask,
)

OPERATOR = "attention"
FORWARD = "attention_forward"


@pytest.fixture
def kernel(monkeypatch):
    """Puts a backend named cpu before the others: the reference, with what a test makes of its results."""

    def install(forward=lambda results: results, backward=lambda grads: grads):
        runs = {
            "FORWARD": lambda *call: forward(reference.forward(*call)),
            "BACKWARD": lambda *call: backward(reference.backward(*call)),
        }
        attention._decided.clear()
        for name, run in runs.items():
            stock = getattr(attention, name)
            fake = Backend("cpu", "unused:unused", accepts_all)
            vars(fake)["run"] = run
            others = (each for each in stock.backends if each.name in ("torch", "reference"))
            replaced = Op(stock.name, (fake, *others))
            for module in (attention, attention_autograd):
                monkeypatch.setattr(module, name, replaced)

    yield install
    attention._decided.clear()


# ------------------------------------------------------------------------------------ verify


def verified(model, inputs):
    return pyarch.verify(model, inputs, timing=False)


def test_attention_verify_passes_a_right_kernel(kernel):
    kernel()
    model = filled(Translator())
    report = verified(model, sentences()).assert_ok()
    assert {"encoder.layers.0", "encoder.layers.1", "decoder", "pooling"} <= {
        layer.name for layer in report.layers if layer.calls
    }
    ran = [layer for layer in report.layers if layer.calls]
    assert {(layer.forward, layer.backward) for layer in ran} <= {
        ("cpu", "cpu"),
        ("cpu+reference", "cpu"),
        ("cpu+torch", "cpu"),
    }
    assert any("dropout set to 0" in note for note in report.notes)
    assert model.decoder.self_attn.dropout == 0.25


def test_attention_verify_names_every_tensor_of_an_attention(kernel):
    kernel()
    layer = built(nn.MultiheadAttention)
    (found,) = verified(layer, tuple(data(nn.MultiheadAttention))).assert_ok().layers
    assert [each.name for each in found.outputs] == ["output[0]", "output[1]"]
    assert {each.name for each in found.gradients} == {
        "input[0]",
        "input[1]",
        "input[2]",
        *(name for name, _ in layer.named_parameters()),
    }


@pytest.mark.parametrize("masks", [{}, {"attn_mask": hidden(L, L), "need_weights": False}])
def test_attention_verify_takes_masks(kernel, masks):
    kernel()
    x = drawn(L, N, E)
    report = verified(built(nn.MultiheadAttention), {"query": x, "key": x, "value": x, **masks}).assert_ok()
    assert report.layers[0].forward.startswith("cpu")


def test_attention_verify_of_a_window_compares_with_its_masks(kernel):
    kernel()
    model = built(nn.TransformerEncoderLayer)
    pyarch.swap(model, rules={"": Config(window=(1, 1))})
    x = drawn(L, N, E)
    stock = Masked(built(nn.TransformerEncoderLayer), window_mask(L, L, (1, 1)))
    stock.layer.load_state_dict(model.state_dict())
    report = pyarch.verify(Masked(model), x, stock=stock, timing=False)
    assert report.assert_ok()


class Masked(nn.Module):
    """An encoder layer, always called with the same mask."""

    def __init__(self, layer, mask=None):
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x):
        return self.layer(x, src_mask=self.mask)


def scaled(position):
    """A kernel's results with one of them off by a thousandth."""

    def damage(results):
        results = list(results)
        if results[position] is not None:
            results[position] = results[position] * 1.001
        return tuple(results)

    return damage


def broken(comparisons):
    return {each.name for each in comparisons if not each.kept}


def test_attention_verify_fails_a_wrong_output(kernel):
    kernel(forward=scaled(0))
    report = verified(built(nn.MultiheadAttention), tuple(data(nn.MultiheadAttention)))
    assert not report.ok and "output[0]" in broken(report.layers[0].outputs)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_attention_verify_fails_each_wrong_gradient(kernel, position):
    kernel(backward=scaled(position))
    report = verified(built(nn.MultiheadAttention), tuple(data(nn.MultiheadAttention)))
    assert not report.ok and f"input[{position}]" in broken(report.layers[0].gradients)


def test_attention_verify_the_cpu_kernels():
    if refusal := native.serving()[1]:
        pytest.skip(refusal)
    with pyarch.backend("cpu"):
        report = verified(filled(Translator()), sentences()).assert_ok()
    ran = [layer for layer in report.layers if layer.calls]
    assert ran and {(layer.forward, layer.backward) for layer in ran} == {("cpu", "cpu")}


# ------------------------------------------------------------------------------------ explain


def test_attention_explain_layer_by_layer(kernel):
    kernel()
    found = pyarch.explain(Translator(), *sentences())
    rows = [(each.layer, each.operation, each.backend) for each in found.choices]
    for layer in ("encoder.layers.0", "encoder.layers.1", "decoder", "pooling"):
        assert (layer, "forward", "cpu") in rows and (layer, "backward", "cpu") in rows


@each_class
def test_attention_explain_says_when_torch_runs_directly(stock):
    inputs = [each.double() for each in data(stock)]
    for each in pyarch.explain(built(stock).double(), *inputs).choices:
        assert each.backend == "torch" and "float64 input" in str(each.verdicts)


@each_class
def test_attention_explain_agrees_with_the_call(stock):
    layer, inputs = built(stock), data(stock)
    choices = pyarch.explain(layer, *inputs).choices
    forward = next(each for each in choices if each.operation == "forward")
    assert {each.backend for each in forward.verdicts} == set(dispatch.BACKENDS)
    pyarch.swap(layer)
    ran = {backend for name, backend in operators_of(layer, *inputs) if name == FORWARD}
    assert ran == {forward.backend}


def test_attention_explain_quotes_the_refusals():
    inputs = data(nn.MultiheadAttention)
    forward = pyarch.explain(built(nn.MultiheadAttention), *inputs).choices[0]
    refusals = {each.backend: each.refusals for each in forward.verdicts}
    assert refusals["cuda"] and not refusals["reference"]

"""explain: the backend of each pass of each layer, the reasons of the others, and a model left as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import pyarch
from pyarch.dispatch import Backend, Op, accepts_all
from pyarch.ops import conv, conv_torch
from tests.swap_cases import depthwise, image, net

OPERATOR = "explain"


@pytest.fixture
def kernel(monkeypatch):
    """A backend named cpu for the forward, that refuses few channels; another that concedes the backward."""

    def few(call):
        if call.input_shape[1] < 8:
            yield f"channels={call.input_shape[1]}, needs 8"

    def slower(call):
        yield "torch is faster here"

    forward = Backend("cpu", "unused:unused", few)
    backward = Backend("cpu", "unused:unused", accepts_all, slower)
    vars(forward)["run"] = conv_torch.forward
    for name, fake in (("FORWARD", forward), ("BACKWARD", backward)):
        stock = [each for each in getattr(conv, name).backends if each.name in ("torch", "reference")]
        monkeypatch.setattr(conv, name, Op(f"conv_{name.lower()}", (fake, *stock)))


def test_explain_a_model_pass_by_pass(kernel):
    model = net()
    pyarch.swap(model)
    found = pyarch.explain(model, image())
    assert [(each.layer, each.operation, each.backend) for each in found.choices] == [
        ("0", "forward", "torch"),
        ("0", "backward", "torch"),
        ("3", "forward", "cpu"),
        ("3", "backward", "torch"),
    ]
    assert found.choices[0].why_not == "cpu: channels=4, needs 8"
    assert found.choices[1].why_not == "cpu: torch is faster here"
    assert found.choices[0].inputs == "2x4x9x9 float32"
    text = str(found)
    assert "[1] not cpu: channels=4, needs 8" in text and "[2] not cpu: torch is faster here" in text
    assert json.loads(found.to_json())["choices"][2]["backend"] == "cpu"


def test_explain_follows_what_is_asked_for_by_name(kernel):
    model = net()
    pyarch.swap(model, rules={"0": pyarch.Config(backend="reference"), "3": pyarch.Config(backend="cpu")})
    chosen = [(each.layer, each.backend) for each in pyarch.explain(model, image()).choices]
    assert chosen == [("0", "reference"), ("0", "reference"), ("3", "cpu"), ("3", "cpu")]
    (first, *_) = pyarch.explain(model, image()).choices
    assert first.why_not == "cpu: channels=4, needs 8 | torch: not asked for"


def test_explain_a_stock_model_says_what_swap_would_bring(kernel):
    model = net()
    found = pyarch.explain(model, image())
    assert len(found.choices) == 4 and "not swapped" in found.notes[0]
    assert type(model[0]) is nn.Conv2d


def test_explain_leaves_the_model_as_it_was():
    model = nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(depthwise()), nn.BatchNorm2d(4), depthwise()
    )
    pyarch.swap(model)
    x = image()
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hooks = [list(module._forward_pre_hooks) for module in model.modules()]
    parameters = list(map(id, model.parameters()))
    assert len(pyarch.explain(model, x).choices) == 4
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [list(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert list(map(id, model.parameters())) == parameters


def test_explain_notes_every_shape_once_and_layers_never_called():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.idle = depthwise(), depthwise()

        def forward(self, x, *, again):
            return self.layer(x), self.layer(x), self.layer(again)

    found = pyarch.explain(Twice(), {"x": image(), "again": torch.randn(1, 4, 5, 5)})
    assert [each.inputs for each in found.choices[::2]] == ["2x4x9x9 float32", "1x4x5x5 float32"]
    assert found.never_called == ("idle",) and "never called: idle" in str(found)


def test_explain_a_layer_called_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = depthwise()

        def forward(self, x):
            return self.layer(input=x)

    assert [each.inputs for each in pyarch.explain(Named(), image()).choices] == ["2x4x9x9 float32"] * 2


def test_explain_both_attentions_of_a_decoder_layer_and_named_arguments():
    layer, x = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8)
    found = pyarch.explain(layer, {"tgt": x, "memory": x[:, :3], "tgt_is_causal": False})
    assert [(each.layer, each.operation) for each in found.choices] == [
        *(("", operation) for operation in ("forward", "backward", "forward, memory", "backward, memory")),
        *(
            (name, operation)
            for name in ("self_attn", "multihead_attn")
            for operation in ("forward", "backward")
        ),
    ]
    assert found.choices[-1].inputs == "2x5x8, 2x3x8, 2x3x8 float32" and found.never_called == ()


def test_explain_says_that_torch_answers_a_hint_without_a_mask():
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    choice = pyarch.explain(layer, {"src": x, "is_causal": True}).choices[0]
    assert choice.backend == "torch" and "torch's own operator runs it directly" in str(choice.verdicts)


def test_explain_an_operator_runs_it_both_ways():
    x, weight = torch.randn(2, 4, 9), torch.randn(4, 1, 3)
    with pyarch.backend("reference"):
        found = pyarch.explain(pyarch.ops.depthwise_conv, x, weight)
    assert [(each.operation, each.backend) for each in found.choices] == [
        ("depthwise_conv_forward", "reference"),
        ("depthwise_conv_backward", "reference"),
    ]
    assert "torch: not asked for" in found.choices[0].why_not
    assert x.grad is None and not x.requires_grad


def test_explain_says_when_torch_runs_directly():
    doubles = torch.randn(2, 4, 9).double(), torch.randn(4, 1, 3).double()
    found = pyarch.explain(pyarch.ops.depthwise_conv, *doubles)
    assert found.choices == () and "torch's own ran" in str(found)
    model = depthwise().double()
    (forward, backward) = pyarch.explain(model, image().double()).choices
    assert forward.backend == backward.backend == "torch" and "float64" in str(forward.verdicts)


def test_explain_refuses_what_does_not_run():
    with pytest.raises(TypeError, match="needs a model or a function, got int"):
        pyarch.explain(3)
    with pytest.raises(ValueError, match="not depthwise"):
        pyarch.explain(nn.Conv2d(4, 4, 1), image())

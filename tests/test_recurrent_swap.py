"""swap, verify, explain and info on recurrent layers: what is re-typed, watched, proven and left alone."""

from __future__ import annotations

import copy
import importlib
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pyarch
from pyarch import dispatch, native
from pyarch.dispatch import Backend, Op, accepts_all
from pyarch.nn.config import Config
from pyarch.ops import recurrent, recurrent_layer
from pyarch.reference import recurrent as reference
from tests.swap_cases import operators_of

OPERATOR = "recurrent"
FORWARD = "recurrent_forward"
STOCK = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
each_class = pytest.mark.parametrize("stock", STOCK, ids=lambda cls: cls.__name__)


@pytest.fixture(autouse=True)
def the_backend_runs_here(request):
    """Skip, quoting the refusal, where the asked backend cannot run on this machine."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    if name == "cpu" and (problem := native.serving()[1]):
        pytest.skip(problem)


@pytest.fixture
def kernel(monkeypatch):
    """Puts a backend named cpu before the others: the reference, with what a test makes of its results."""

    def install(forward=lambda results: results, backward=lambda grads: grads):
        runs = {
            "FORWARD": lambda *call: forward(reference.forward(*call)),
            "BACKWARD": lambda *call: backward(reference.backward(*call)),
        }
        for name, run in runs.items():
            stock = getattr(recurrent, name)
            fake = Backend("cpu", "unused:unused", accepts_all)
            vars(fake)["run"] = run
            others = (each for each in stock.backends if each.name in ("torch", "reference"))
            replaced = Op(stock.name, (fake, *others))
            for module in (recurrent, recurrent_layer):
                monkeypatch.setattr(module, name, replaced)

    return install


class Tagger(nn.Module):
    """Packs its input, runs a two-directional LSTM on it, then a GRU with a named first state."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(3, 4, bidirectional=True, batch_first=True)
        self.second = nn.GRU(8, 5, num_layers=2, batch_first=True, dropout=0.25)
        self.head = nn.Linear(5, 2)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed, (h_n, _) = self.first(packed)
        padded, _ = pad_packed_sequence(packed, batch_first=True)
        output, _ = self.second(padded, hx=h_n.new_ones(2, len(lengths), 5))
        return self.head(output)


class Stepper(nn.Module):
    """Two cells in a loop."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTMCell(3, 4), nn.GRUCell(4, 4)

    def forward(self, x):
        state, h = None, None
        for step in x:
            state = self.first(step, state)
            h = self.second(state[0], hx=h)
        return h


def batch():
    return torch.randn(3, 6, 3), torch.tensor([4, 6, 1])


def nets():
    return nn.ModuleDict({cls.__name__: cls(3, 4) for cls in STOCK})


def results_of(model, *inputs):
    output = model(*inputs)
    output.square().sum().backward()
    return [output, *(parameter.grad for parameter in model.parameters())]


# ------------------------------------------------------------------------------------ what is swapped


def test_recurrent_swap_serves_the_six_classes():
    model = nets()
    report = pyarch.swap(model)
    assert {record.name: record.now for record in report.swapped} == {
        cls.__name__: f"pyarch.nn.{cls.__name__}" for cls in STOCK
    }
    assert {record.was for record in report.swapped} == {f"torch.nn.{cls.__name__}" for cls in STOCK}
    assert all(record.backend for record in report.swapped)
    for cls in STOCK:
        assert type(model[cls.__name__]) is getattr(pyarch.nn, cls.__name__)
    report.restore()
    assert [type(layer) for layer in model.values()] == list(STOCK)


@each_backend
@pytest.mark.parametrize("model, inputs", [(Tagger, batch()), (Stepper, (torch.randn(5, 2, 3),))])
def test_recurrent_swap_computes_the_same(backend, model, inputs):
    stock = model().eval()
    ours = copy.deepcopy(stock)
    report = pyarch.swap(ours, backend=backend)
    torch.testing.assert_close(results_of(ours, *inputs), results_of(stock, *inputs))
    assert {name for _, name in operators_of(ours, *inputs)} == {backend}
    state = copy.deepcopy(ours.state_dict())
    report.restore()
    assert operators_of(ours, *inputs) == []
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


@each_class
def test_recurrent_swap_names_the_backend_that_runs(stock):
    layer = stock(3, 4)
    (record,) = pyarch.swap(layer).swapped
    x = torch.randn(32, 3) if isinstance(layer, nn.RNNBase) else torch.randn(1, 3)
    ((_, chosen),) = operators_of(layer, x)
    if " or torch, by shape" in record.backend:
        assert chosen in (record.backend.split()[0], "torch")
    else:
        assert record.backend == chosen


@each_class
def test_recurrent_swap_in_float64_names_torch(stock):
    (record,) = pyarch.swap(stock(3, 4).double()).swapped
    assert record.backend == "torch" and "float64" in record.reason


def test_recurrent_swap_report_keeps_recompute():
    model = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.GRU(3, 4)})
    text = pyarch.swap(model, rules={"a": Config(recompute=True), "b": Config()}).to_json()
    again = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.GRU(3, 4)})
    pyarch.apply_report(again, text)
    assert [again[name].pyarch_config.recompute for name in "ab"] == [True, False]
    with pytest.raises(ValueError, match="recompute should be of type bool, got int"):
        pyarch.apply_report(model, text.replace("true", "1"))


def test_recurrent_config_checks_recompute():
    with pytest.raises(TypeError, match="recompute should be of type bool, got str"):
        Config(recompute="yes")


# ------------------------------------------------------------------------------------ what a user derived


class Named(nn.LSTM):
    """Overrides nothing of the computation."""

    def __init__(self, width):
        super().__init__(width, width, batch_first=True)

    def flatten_parameters(self):
        pass

    def extra_repr(self):
        return "named"


class Checked(nn.GRU):
    def check_forward_args(self, input, hidden, batch_sizes):
        pass


class Ordered(nn.LSTM):
    def permute_hidden(self, hx, permutation):
        return hx


class Summed(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input, hx)[0].sum(0)


class Leaky(nn.GRUCell):
    def forward(self, input, hx=None):
        return 0.9 * super().forward(input, hx)


def test_recurrent_swap_takes_a_subclass_that_overrides_nothing():
    layer = Named(3)
    x = torch.randn(2, 5, 3)
    expected = layer(x)
    report = pyarch.swap(nn.Sequential(layer))
    assert isinstance(layer, pyarch.nn.LSTM) and isinstance(layer, Named) and repr(layer) == "Named(named)"
    assert len(operators_of(layer, x)) == 1
    torch.testing.assert_close(layer(x), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is Named
    report.restore()
    assert type(layer) is Named


@pytest.mark.parametrize(
    "cls, name, ours",
    [
        (Checked, "check_forward_args", "GRU"),
        (Ordered, "permute_hidden", "LSTM"),
        (Summed, "forward", "LSTM"),
        (Leaky, "forward", "GRUCell"),
    ],
)
def test_recurrent_swap_leaves_a_subclass_that_overrides_the_computation(cls, name, ours):
    model = nn.ModuleList([nn.GRU(3, 4), cls(3, 4)])
    (record,) = pyarch.swap(model).skipped
    assert record.code == "overridden" and record.reason == f"{cls.__name__} overrides {name}"
    assert record.hint == f"derive from pyarch.nn.{ours} instead"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("wrap", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
@each_class
def test_recurrent_swap_takes_rewritten_weights(stock, wrap):
    layer = stock(3, 4)
    name = "weight_hh_l0" if isinstance(layer, nn.RNNBase) else "weight_hh"
    wrap(layer, name)
    layer.eval()
    x, cls = torch.randn(5, 3), type(layer)
    expected = layer(x)
    report = pyarch.swap(layer)
    assert len(operators_of(layer, x)) == 1
    torch.testing.assert_close(layer(x), expected)
    report.restore()
    assert type(layer) is cls
    torch.testing.assert_close(layer(x), expected)


def test_recurrent_swap_restores_what_was_parametrized_after_it():
    layer = nn.LSTM(3, 4)
    report = pyarch.swap(layer)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    expected = layer(x := torch.randn(5, 3))
    report.restore()
    assert not isinstance(layer, pyarch.nn.LSTM) and parametrize.is_parametrized(layer)
    torch.testing.assert_close(layer(x), expected)


# ------------------------------------------------------------------------------------ quantization


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*quantized")
def test_recurrent_swap_comes_after_dynamic_quantization_or_is_restored_before_it():
    """quantize_dynamic finds layers by exact type: it passes swapped ones by; swap leaves quantized ones."""
    model = nn.Sequential(nn.LSTM(3, 4))
    report = pyarch.swap(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert isinstance(quantized[0], pyarch.nn.LSTM)
    report.restore()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert not isinstance(quantized[0], nn.LSTM) and "quantized" in type(quantized[0]).__module__
    assert pyarch.swap(nn.Sequential(quantized, nn.GRU(3, 4))).skipped == []


# ------------------------------------------------------------------------------------ verify


def verified(model, inputs):
    return pyarch.verify(model, inputs, timing=False)


@pytest.mark.parametrize("model, inputs", [(Tagger, batch()), (Stepper, (torch.randn(5, 2, 3),))])
def test_recurrent_verify_passes_a_right_kernel(kernel, model, inputs):
    kernel()
    report = verified(model(), inputs).assert_ok()
    assert [(layer.name, layer.forward, layer.backward) for layer in report.layers] == [
        ("first", "cpu", "cpu"),
        ("second", "cpu", "cpu"),
    ]


def test_recurrent_verify_names_every_tensor_of_a_layer(kernel):
    kernel()
    first, second = verified(Tagger(), batch()).assert_ok().layers
    assert [each.name for each in first.outputs] == ["output[0].data", "output[1][0]", "output[1][1]"]
    assert [each.name for each in first.gradients] == [
        "input[0].data",
        *(name for name, _ in nn.LSTM(3, 4, bidirectional=True).named_parameters()),
    ]
    assert [each.name for each in second.outputs] == ["output[0]", "output[1]"]
    assert {each.name for each in second.gradients} >= {"input[0]", "input['hx']", "weight_hh_l1"}


def test_recurrent_verify_says_that_dropout_is_off(kernel):
    kernel()
    model = Tagger()
    assert "dropout set to 0 in second" in verified(model, batch()).assert_ok().notes
    assert model.second.dropout == 0.25


def test_recurrent_verify_counts_the_calls_of_a_cell(kernel):
    kernel()
    report = verified(Stepper(), torch.randn(5, 2, 3)).assert_ok()
    assert [layer.calls for layer in report.layers] == [5, 5]


@pytest.mark.parametrize("inputs", [torch.randn(5, 2, 3), torch.randn(5, 3)], ids=["batch", "one sequence"])
@pytest.mark.parametrize("wraps", [False, True], ids=["plain", "weight_norm"])
def test_recurrent_verify_a_layer_itself(kernel, inputs, wraps):
    kernel()
    layer = nn.LSTM(3, 4, proj_size=2, num_layers=2)
    if wraps:
        parametrizations.weight_norm(layer, "weight_hh_l0")
    layer(inputs)
    verified(layer, inputs).assert_ok()


def test_recurrent_verify_a_packed_sequence(kernel):
    kernel()
    sequence = pack_padded_sequence(torch.randn(6, 3, 3), [4, 6, 1], enforce_sorted=False)
    report = verified(nn.GRU(3, 4), sequence).assert_ok()
    assert [each.name for each in report.outputs] == ["output[0].data", "output[1]"]
    assert "input[0].data" in {each.name for each in report.gradients}
    assert not sequence.data.requires_grad


def scaled(position):
    """A kernel's results with one of them off by a thousandth."""

    def damage(results):
        results = list(results)
        if isinstance(results[position], list):
            results[position] = [grad if grad is None else grad * 1.001 for grad in results[position]]
        elif results[position] is not None:
            results[position] = results[position] * 1.001
        return tuple(results)

    return damage


def broken(comparisons):
    return {each.name for each in comparisons if not each.kept}


@pytest.mark.parametrize("position, name", enumerate(["output[0].data", "output[1][0]", "output[1][1]"]))
def test_recurrent_verify_fails_each_wrong_output(kernel, position, name):
    kernel(forward=scaled(position))
    report = verified(Tagger(), batch())
    assert not report.ok and name in broken(report.layers[0].outputs)


@pytest.mark.parametrize(
    "position, name", [(0, "input[0]"), (1, "input['hx']"), (3, "weight_ih_l0"), (3, "bias_hh_l1")]
)
def test_recurrent_verify_fails_each_wrong_gradient(kernel, position, name):
    kernel(backward=scaled(position))
    report = verified(Tagger(), batch())
    assert not report.ok and name in broken(report.layers[1].gradients)


@pytest.mark.parametrize("model, inputs", [(Tagger, batch()), (Stepper, (torch.randn(5, 2, 3),))])
def test_recurrent_verify_the_cpu_kernels(model, inputs):
    if refusal := native.serving()[1]:
        pytest.skip(refusal)
    with pyarch.backend("cpu"):
        report = verified(model(), inputs).assert_ok()
    assert {(layer.forward, layer.backward) for layer in report.layers} == {("cpu", "cpu")}


# ------------------------------------------------------------------------------------ explain, info


def test_recurrent_explain_layer_by_layer(kernel):
    kernel()
    found = pyarch.explain(Tagger(), *batch())
    assert [(each.layer, each.inputs, each.operation, each.backend) for each in found.choices] == [
        ("first", "11x3 float32", "forward", "cpu"),
        ("first", "11x3 float32", "backward", "cpu"),
        ("second", "3x6x8, 2x3x5 float32", "forward", "cpu"),
        ("second", "3x6x8, 2x3x5 float32", "backward", "cpu"),
    ]


def test_recurrent_explain_cells(kernel):
    kernel()
    found = pyarch.explain(Stepper(), torch.randn(5, 2, 3))
    assert [(each.layer, each.inputs) for each in found.choices[::2]] == [
        ("first", "2x3 float32"),
        ("second", "2x4 float32"),
        ("first", "2x3, 2x4, 2x4 float32"),
        ("second", "2x4, 2x4 float32"),
    ]


@each_class
def test_recurrent_explain_says_when_torch_runs_directly(stock):
    layer = stock(3, 4).double()
    for each in pyarch.explain(layer, torch.randn(2, 3).double()).choices:
        assert each.backend == "torch" and "float64 input (2, 3)" in str(each.verdicts)


@each_class
def test_recurrent_explain_agrees_with_the_call(stock):
    layer = stock(3, 4)
    x = torch.randn(32, 3) if isinstance(layer, nn.RNNBase) else torch.randn(1, 3)
    forward, backward = pyarch.explain(layer, x).choices
    pyarch.swap(layer)
    assert operators_of(layer, x) == [(FORWARD, forward.backend)]
    assert {each.backend for each in backward.verdicts} == set(dispatch.BACKENDS)


def test_recurrent_explain_quotes_the_refusals():
    (forward, _) = pyarch.explain(nn.GRU(3, 4), torch.randn(5, 2, 3)).choices
    refusals = {each.backend: each.refusals for each in forward.verdicts}
    assert refusals["cuda"] and not refusals["reference"]


def test_recurrent_info_tells_of_an_operator_that_a_backend_lacks(monkeypatch):
    def refuse(call):
        yield "no recurrent kernels"

    others = recurrent.FORWARD.backends[1:]
    lacking = Op("recurrent_forward", (Backend("triton", "unused:unused", refuse), *others))
    calls = importlib.import_module("pyarch.info").PLAIN_CALLS
    monkeypatch.setitem(calls, "recurrent", (lacking, calls["recurrent"][1]))
    text = pyarch.info().backends["triton"]
    assert "depthwise_conv: " in text and text.endswith("; recurrent: no recurrent kernels")

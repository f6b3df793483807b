"""swap: what is re-typed, what is left alone and why, by which rules, and what the report says."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import pyarch
from pyarch.nn.drop_in import CONFIG_ATTRIBUTE
from tests.swap_cases import RECORDED, depthwise, image, net, operators_of

OPERATOR = "swap"


class Doubling(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Padded(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(nn.functional.pad(input, (1, 1)), weight, bias)


class Saver(nn.Conv2d):
    def __deepcopy__(self, memo):
        raise RuntimeError("never copied")


class Listed(type(nn.Module)):
    """A metaclass of a user's own."""


class Registered(nn.Conv2d, metaclass=Listed):
    pass


def codes(report):
    return {record.name: record.code for record in report.skipped}


# -------------------------------------------------------------------------------- what is swapped


def test_swap_runs_the_layers_on_our_operator_and_computes_the_same():
    model, x = net(), image()
    before = model(x)
    report = pyarch.swap(model)
    assert [record.name for record in report.swapped] == ["0", "3"]
    assert type(model[0]) is pyarch.nn.Conv2d and isinstance(model[0], nn.Conv2d)
    assert [name for name, _ in operators_of(model, x)] == [RECORDED, RECORDED]
    torch.testing.assert_close(model(x), before)


def test_swap_leaves_a_convolution_of_one_channel_alone():
    """groups == in_channels == 1 holds for every dense convolution of a grey image."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), depthwise())
    report = pyarch.swap(model)
    (left,) = report.skipped
    assert (left.name, left.code, left.reason) == (
        "0",
        "not-depthwise",
        "one input channel: a dense convolution",
    )
    assert type(model[0]) is nn.Conv2d and type(model[1]) is pyarch.nn.Conv2d
    assert "left alone: 1 x torch.nn.Conv2d, one input channel: a dense convolution" in str(report)


@pytest.mark.parametrize(
    "stock, ours, dimensions", [(nn.Conv1d, pyarch.nn.Conv1d, 1), (nn.Conv3d, pyarch.nn.Conv3d, 3)]
)
def test_swap_serves_every_dimension(stock, ours, dimensions):
    layer = depthwise(cls=stock)
    pyarch.swap(layer)
    assert type(layer) is ours
    assert operators_of(layer, torch.randn(1, 4, *[5] * dimensions))[0][0] == RECORDED


def test_swap_serves_transformers_layer_by_layer_and_inside():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    report = pyarch.swap(model)
    assert {record.name: record.now.removeprefix("pyarch.nn.") for record in report.swapped} == {
        "encoder.layers.0": "TransformerEncoderLayer",
        "encoder.layers.0.self_attn": "MultiheadAttention",
        "decoder.layers.0": "TransformerDecoderLayer",
        "decoder.layers.0.self_attn": "MultiheadAttention",
        "decoder.layers.0.multihead_attn": "MultiheadAttention",
    }
    x = torch.randn(2, 5, 8)
    assert [name for name, _ in operators_of(model, x, x)] == ["attention_forward"] * 3
    report.restore()
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention


def test_swap_serves_depth_multipliers():
    layer = nn.Conv2d(4, 12, 3, groups=4)
    assert pyarch.swap(layer).swapped[0].now == "pyarch.nn.Conv2d"


def test_swap_serves_the_root_itself():
    layer = depthwise()
    report = pyarch.swap(layer)
    assert report.swapped[0].name == "" and "(the model)" in str(report)


def test_swap_counts_a_shared_layer_once_under_all_its_names():
    shared = depthwise()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = pyarch.swap(model)
    assert len(report.swapped) == 1
    assert report.swapped[0].names == ("a", "b.0")
    assert "also b.0" in str(report)


@pytest.mark.parametrize("name", ["a", "b.0"])
def test_swap_rules_fit_any_name_of_a_shared_layer(name):
    shared = depthwise()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": depthwise()})
    assert codes(pyarch.swap(model, rules={name: None})) == {"a": "rule"}


def test_swap_keeps_what_is_not_a_candidate():
    model = nn.Sequential(depthwise(), nn.ConvTranspose2d(4, 4, 3, groups=4), nn.Linear(3, 3))
    report = pyarch.swap(model)
    assert report.skipped == [] and type(model[1]) is nn.ConvTranspose2d


def test_swap_twice_is_harmless():
    model = net()
    first = pyarch.swap(model)
    second = pyarch.swap(model)
    assert second.swapped == [] and codes(second) == {"0": "already", "2": "not-depthwise", "3": "already"}
    second.restore()
    assert type(model[0]) is pyarch.nn.Conv2d
    first.restore()
    assert type(model[0]) is nn.Conv2d


def test_swap_again_with_another_config_says_how():
    model = depthwise()
    pyarch.swap(model)
    (record,) = pyarch.swap(model, backend="torch").skipped
    assert record.code == "already" and "restore" in record.hint


def test_swap_in_bfloat16_and_float64_names_what_runs():
    model = nn.Sequential(depthwise().to(torch.float64))
    (record,) = pyarch.swap(model).swapped
    assert record.backend == "torch" and "float64" in record.reason


# -------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize(
    "cls, name", [(Doubling, "forward"), (Padded, "_conv_forward"), (Saver, "__deepcopy__")]
)
def test_swap_leaves_a_subclass_that_overrides_the_computation(cls, name):
    model = nn.Sequential(depthwise(), depthwise(cls=cls))
    (record,) = pyarch.swap(model).skipped
    assert record.code == "overridden" and record.reason == f"{cls.__name__} overrides {name}"
    assert type(model[1]) is cls


def test_swap_leaves_a_class_with_a_metaclass():
    model = nn.Sequential(depthwise(), depthwise(cls=Registered))
    assert codes(pyarch.swap(model)) == {"1": "metaclass"}


def test_swap_leaves_an_instance_with_a_forward_of_its_own():
    model = nn.Sequential(depthwise(), depthwise())
    stock = model[1].forward
    model[1].forward = lambda input: stock(input) + 1
    assert codes(pyarch.swap(model)) == {"1": "patched"}


def test_swap_leaves_lazy_layers_until_they_know_their_shapes():
    model = nn.Sequential(depthwise(), nn.LazyConv2d(4, 3, groups=4))
    (record,) = pyarch.swap(model).skipped
    assert record.code == "lazy" and "run the model once" in record.hint
    model(image())
    assert [each.name for each in pyarch.swap(model).swapped] == ["1"]


def test_swap_leaves_what_where_refuses():
    model = net()
    report = pyarch.swap(model, where=lambda name, layer: layer.in_channels == 8)
    assert [record.name for record in report.swapped] == ["3"] and codes(report)["0"] == "where"


def test_swap_refuses_torchscript():
    with pytest.raises(TypeError, match="swap the model that it was made from, and use torch.compile"):
        pyarch.swap(torch.jit.script(net()))
    scripted_part = nn.Sequential(depthwise(), torch.jit.script(depthwise()))
    assert codes(pyarch.swap(scripted_part)) == {"1": "scripted"}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
def test_swap_a_swapped_model_is_scripted_after_restore():
    model = net()
    report = pyarch.swap(model)
    with pytest.raises(TypeError, match="this Conv2d is pyarch's; restore the model first"):
        torch.jit.script(model)
    assert [each.name for each in report.swapped] == ["0", "3"] and type(model[3]) is pyarch.nn.Conv2d
    report.restore()
    torch.testing.assert_close(torch.jit.script(model)(x := image()), model(x))


def test_swap_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="needs a torch.nn.Module, got list"):
        pyarch.swap([depthwise()])


def test_swap_of_nothing_raises_with_every_reason():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), depthwise(cls=Doubling))
    with pytest.raises(ValueError) as raised:
        pyarch.swap(model)
    text = str(raised.value)
    assert "2 x torch.nn.Conv2d: not depthwise" in text
    assert "Doubling overrides forward; derive from pyarch.nn.Conv2d instead" in text
    with pytest.raises(ValueError, match="holds no Conv1d, Conv2d, Conv3d"):
        pyarch.swap(nn.Linear(2, 2))


def test_swap_min_swaps_leaves_the_model_alone_when_not_met():
    model = net()
    with pytest.raises(ValueError, match="min_swaps=3"):
        pyarch.swap(model, min_swaps=3)
    assert type(model[0]) is nn.Conv2d
    assert pyarch.swap(nn.Linear(2, 2), min_swaps=0).swapped == []


def test_swap_dry_run_changes_nothing_and_never_raises():
    model = net()
    report = pyarch.swap(model, dry_run=True)
    assert [record.now for record in report.swapped] == ["pyarch.nn.Conv2d"] * 2
    assert type(model[0]) is nn.Conv2d and "would be swapped" in str(report)
    assert pyarch.swap(nn.Linear(2, 2), dry_run=True).swapped == []


def test_swap_table_counts_what_is_not_depthwise():
    model = nn.Sequential(depthwise(), *(nn.Conv2d(4, 4, 1) for _ in range(5)))
    text = str(pyarch.swap(model))
    assert "left alone: 5 x torch.nn.Conv2d, not depthwise" in text
    assert len(text.splitlines()) < 9


# -------------------------------------------------------------------------------- rules


def test_swap_first_matching_rule_decides():
    model = nn.ModuleDict({"enc": net(), "head": net()})
    rules = {
        "enc.0": None,
        "enc.*": pyarch.Config(backend="reference"),
        "re:.*head.*": pyarch.Config(backend="torch"),
    }
    report = pyarch.swap(model, rules=rules)
    assert {record.name: record.config.backend for record in report.swapped} == {
        "enc.3": "reference",
        "head.0": "torch",
        "head.3": "torch",
    }
    assert codes(report)["enc.0"] == "rule"
    assert operators_of(model["enc"], image()) == [(RECORDED, "reference")]


def test_swap_backend_serves_what_no_rule_names():
    model = net()
    pyarch.swap(model, backend="reference", rules={"3": pyarch.Config()})
    assert operators_of(model[0], image()) == [(RECORDED, "reference")]
    assert CONFIG_ATTRIBUTE not in vars(model[3])


def test_swap_patterns_fit_the_whole_name():
    model = nn.ModuleDict({"head": depthwise(), "headless": depthwise()})
    assert codes(pyarch.swap(model, rules={"re:head": None})) == {"head": "rule"}


def test_swap_warns_of_a_rule_that_fits_nothing():
    with pytest.warns(UserWarning, match="'decoder.*' fits no layer"):
        pyarch.swap(net(), rules={"decoder.*": None})


@pytest.mark.parametrize(
    "rules, error, text",
    [
        ({"re:(": None}, ValueError, "not a regular expression"),
        ({"a": "cpu"}, TypeError, "needs a pyarch.Config or None"),
        ({3: None}, TypeError, "needs a glob"),
    ],
)
def test_swap_rejects_bad_rules(rules, error, text):
    with pytest.raises(error, match=text):
        pyarch.swap(net(), rules=rules)


def test_swap_rejects_an_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        pyarch.swap(net(), backend="gpu")


# -------------------------------------------------------------------------------- observe, JSON


class Bypassed(nn.Module):
    """Runs one layer and only reads the parameters of the other, as Mamba's blocks do."""

    def __init__(self):
        super().__init__()
        self.run, self.read = depthwise(), depthwise()

    def forward(self, x):
        return nn.functional.conv2d(self.run(x), self.read.weight, groups=4)


def test_swap_observe_names_the_layers_never_called():
    model = Bypassed()
    report = pyarch.swap(model)
    assert report.never_called is None
    with report.observe():
        pass
    assert report.never_called == ["run", "read"]
    with report.observe():
        model(image())
    assert report.never_called == ["read"]
    assert "never called: read" in str(report)
    model.run(image())
    assert not torch.nn.modules.module._global_forward_pre_hooks
    with report.observe():
        model.read(image())
    assert report.never_called == []


def test_swap_observe_sees_attention_that_its_layer_passes_by():
    """In evaluation without gradients torch's own layers would call no attention module."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    report = pyarch.swap(model, rules={"layers.0": pyarch.Config(), "*": None})
    assert [record.name for record in report.swapped] == ["layers.0"]
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        for inputs in ((x,), (x, None, padding)):
            assert [name for name, _ in operators_of(model, *inputs)] == ["attention_forward"]
    report.restore()
    report = pyarch.swap(model)
    with torch.no_grad(), report.observe():
        model(x, src_key_padding_mask=padding)
    assert report.never_called == []


def test_swap_report_reads_back_a_window():
    rules = {"": pyarch.Config(window=(2, None), window_dilation=3, global_tokens=1)}
    text = pyarch.swap(nn.MultiheadAttention(8, 2), rules=rules).to_json()
    model = nn.MultiheadAttention(8, 2)
    assert pyarch.apply_report(model, text).swapped[0].config == rules[""]
    assert model.pyarch_config.window == (2, None)


def test_swap_report_reads_back():
    rules = {"3": pyarch.Config(backend="reference")}
    first = pyarch.swap(net(), rules=rules)
    text = first.to_json()
    assert json.loads(text)["schema"] == "pyarch.swap/1"
    model = net()
    second = pyarch.apply_report(model, text)
    assert second.swapped == first.swapped
    assert operators_of(model[3], image(8)) == [(RECORDED, "reference")]
    second.restore()
    assert type(model[0]) is nn.Conv2d
    assert len(pyarch.apply_report(net(), json.loads(text)).swapped) == 2


def tampered(change):
    document = json.loads(pyarch.swap(net()).to_json())
    change(document["swapped"][1])
    return json.dumps(document)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "schema 'list'"),
        ('{"schema": "other"}', "schema 'other', needs 'pyarch.swap/1'"),
        ('{"schema": "pyarch.swap/1"}', "'swapped' is NoneType"),
        ('{"schema": "pyarch.swap/1", "swapped": [3]}', r"swapped\[0\] is int"),
        ('{"schema": "pyarch.swap/1", "swapped": [{"name": 3}]}', r"swapped\[0\].name is 3"),
        (tampered(lambda record: record.update(name="9")), "layer '9' is none of this model's"),
        (
            tampered(lambda record: record.update(was="torch.nn.Conv1d")),
            "is a torch.nn.Conv2d, the report needs torch.nn.Conv1d",
        ),
        (tampered(lambda record: record.update(name="2")), "cannot be swapped: not depthwise"),
        (tampered(lambda record: record.update(config={"backend": "gpu"})), "unknown backend 'gpu'"),
        (tampered(lambda record: record.update(config={"shell": "x"})), "needs an object of backend"),
        (tampered(lambda record: record.update(config={"backend": 3})), "unknown backend 3"),
    ],
)
def test_swap_report_is_checked_before_anything_changes(text, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        pyarch.apply_report(model, text)
    assert type(model[0]) is nn.Conv2d

"""swap(model, sdpa=True): the model itself gets a class whose forward runs in an attention_context."""

from __future__ import annotations

import copy
import inspect
import io
import json
from abc import ABC

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pyarch
from pyarch import native
from pyarch.ops import attention
from tests.attention_context_cases import Mixed, Net, tokens
from tests.swap_cases import depthwise, operators_of
from tests.test_swap_transparent import Scaled, snapshot

OPERATOR = "swap"
NOW = "pyarch.attention_context"

_missing = native.serving()[1]
needs_kernels = pytest.mark.skipif(bool(_missing), reason=_missing or "never")


def count(model, *inputs):
    """How many attentions ran on pyarch."""
    return [name for name, _ in operators_of(model, *inputs)].count("attention_forward")


def codes(report):
    return {record.name: record.code for record in report.skipped}


# -------------------------------------------------------------------------------- what it does


def test_swap_sdpa_serves_a_model_without_a_layer_of_ours():
    model, x = Net(), tokens()
    wanted = model(x)
    report = pyarch.swap(model, sdpa=True)
    assert count(model, x) == 2
    torch.testing.assert_close(model(x), wanted)
    (record,) = report.swapped
    assert (record.name, record.now, record.code) == ("", NOW, "swapped")
    assert record.was == "tests.attention_context_cases.Net"
    assert "plain attention swapped" in str(report) and "(the model)" in str(report)


def test_swap_sdpa_goes_with_layers_and_rules():
    model, x = Mixed(), tokens()
    wanted = model(x)
    report = pyarch.swap(model, sdpa=True)
    assert [record.name for record in report.swapped] == ["", "layer"] and count(model, x) == 2
    torch.testing.assert_close(model(x), wanted)
    report.restore()
    assert count(model, x) == 0
    assert codes(pyarch.swap(model, rules={"*": None}, sdpa=True)) == {"layer": "rule"}
    assert count(model, x) == 1


def test_swap_sdpa_backward_is_ours():
    model = Net()
    pyarch.swap(model, sdpa=True)
    with pyarch.backend("reference"):
        y = model(tokens()).sum()
    assert [name for name, _ in operators_of(y.backward)] == ["attention_backward"] * 2


def test_swap_of_nothing_names_sdpa():
    with pytest.raises(ValueError, match=r"F.scaled_dot_product_attention itself: pyarch.swap\(model, sdpa="):
        pyarch.swap(Net())
    with pytest.raises(ValueError) as raised:
        pyarch.swap(nn.ModuleList([Net()]), sdpa=True)
    assert "1 x torch.nn.ModuleList: ModuleList has no forward; swap the modules" in str(raised.value)
    assert "F.scaled_dot_product_attention" not in str(raised.value)


def test_swap_sdpa_dry_run_changes_nothing():
    model = Net()
    report = pyarch.swap(model, sdpa=True, dry_run=True)
    assert type(model) is Net and [record.now for record in report.swapped] == [NOW]
    assert "plain attention would be swapped" in str(report)


def test_swapped_sdpa_is_restored_after_an_error():
    model = Net()
    with pytest.raises(RuntimeError, match="inside"), pyarch.swapped(model, sdpa=True):
        assert count(model, tokens()) == 2
        raise RuntimeError("inside")
    assert type(model) is Net


def test_swap_sdpa_twice_is_harmless():
    model = Net()
    first = pyarch.swap(model, sdpa=True)
    second = pyarch.swap(model, sdpa=True)
    assert second.swapped == [] and codes(second) == {"": "already"}
    second.restore()
    assert count(model, tokens()) == 2
    first.restore()
    assert type(model) is Net


def test_swap_sdpa_of_a_part_serves_the_part():
    model, x = Net(), tokens()
    report = pyarch.swap(model.second, sdpa=True)
    assert count(model, x) == 1
    report.restore()
    assert count(model, x) == 0


# -------------------------------------------------------------------------------- nothing else changes


def test_swap_sdpa_restore_is_exact():
    model, x = Mixed(), tokens()
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    before, printed, output = snapshot(model), repr(model), model(x)
    report = pyarch.swap(model, sdpa=True)
    assert repr(model) == printed and isinstance(model, Mixed) and type(model).__name__ == "Mixed"
    torch.testing.assert_close(model(x), output)
    report.restore()
    assert snapshot(model) == before and torch.equal(model(x), output)
    report.restore()
    assert snapshot(model) == before


def test_swap_sdpa_keeps_parameters_hooks_state_dict_and_signature():
    model, called = Net(), []
    parameters, keys, attributes = (
        list(map(id, model.parameters())),
        list(model.state_dict()),
        set(vars(model)),
    )
    model.register_forward_pre_hook(lambda *_: called.append("pre"))
    model.register_full_backward_hook(lambda *_: called.append("backward"))
    signature, text = inspect.signature(model.forward), model.forward.__doc__
    pyarch.swap(model, sdpa=True)
    model(tokens().requires_grad_(), is_causal=False).sum().backward()
    assert called == ["pre", "backward"] and set(vars(model)) == attributes
    assert list(map(id, model.parameters())) == parameters and list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature and model.forward.__doc__ == text
    model.load_state_dict(Net().state_dict(), strict=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
def test_swap_sdpa_copies_stay_swapped(duplicate):
    model, x = Net(), tokens()
    report = pyarch.swap(model, sdpa=True)
    twin = duplicate(model)
    assert type(twin) is type(model) and count(twin, x) == 2
    assert torch.equal(twin(x), model(x))
    report.restore()
    assert count(twin, x) == 2 and count(model, x) == 0


def test_swap_sdpa_is_saved_as_stock():
    model, x = Net(), tokens()
    pyarch.swap(model, sdpa=True)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"pyarch" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is Net and count(model, x) == 2
    torch.testing.assert_close(loaded(x), model(x))


def test_swap_sdpa_serves_functional_call():
    model, other, x = Net(), Net(), tokens()
    pyarch.swap(model, sdpa=True)
    parameters = dict(other.named_parameters())
    assert count(lambda x: torch.func.functional_call(model, parameters, (x,)), x) == 2
    torch.testing.assert_close(torch.func.functional_call(model, parameters, (x,)), other(x))


def test_swap_sdpa_serves_a_parametrized_model():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.weight = Net(), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.weight * self.net(x)

    model, x = Scale(), tokens()
    parametrize.register_parametrization(model, "weight", Scaled())
    original, wanted = type(model), model(x)
    report = pyarch.swap(model, sdpa=True)
    assert count(model, x) == 2 and count(copy.deepcopy(model), x) == 2
    torch.testing.assert_close(model(x), wanted)
    report.restore()
    assert type(model) is original and torch.equal(model(x), wanted)


def test_swap_sdpa_leaves_the_registry_of_a_base_class_alone():
    known = []

    class Registered(Net, ABC):
        def __init_subclass__(cls, **options):
            known.append(cls.__name__)

    class Mine(Registered):
        pass

    model = Mine()
    report = pyarch.swap(model, sdpa=True)
    assert known == ["Mine"] and isinstance(model, Mine) and count(model, tokens()) == 2
    report.restore()
    assert type(model) is Mine


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
def test_swap_sdpa_is_not_scripted():
    model = Net()
    pyarch.swap(model, sdpa=True)
    with pytest.raises(TypeError, match="restore the model first"):
        torch.jit.script(model)


@pytest.mark.parametrize("first", ["swap", "compile"])
def test_swap_sdpa_compiles_whole(first):
    torch._dynamo.reset()
    model, x = Net(), tokens()
    wanted = model(x)
    if first == "swap":
        pyarch.swap(model, sdpa=True)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), wanted)
        pyarch.swap(compiled, sdpa=True)
    assert count(compiled, x) == 2
    torch.testing.assert_close(compiled(x), wanted)


# -------------------------------------------------------------------------------- what is refused


class Meta(type(nn.Module)):
    pass


class Listed(Net, metaclass=Meta):
    pass


class Saver(Net):
    def __deepcopy__(self, memo):
        raise RuntimeError("never copied")


class Stateful(Net):
    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}


def patched():
    model = Net()
    model.forward = lambda x: x
    return model


REFUSED = {
    "layer": (depthwise, "Conv2d is itself a layer that swap looks for", ""),
    "no-forward": (lambda: nn.ModuleList([Net()]), "ModuleList has no forward", "swap the modules"),
    "metaclass": (Listed, "Listed has the metaclass Meta", "inside pyarch.attention_context()"),
    "overridden": (Saver, "Saver overrides __deepcopy__", "inside pyarch.attention_context()"),
    "overridden by a state": (
        Stateful,
        "Stateful overrides __getstate__",
        "inside pyarch.attention_context()",
    ),
    "patched": (patched, "the instance has a forward of its own", "before it is patched"),
}


@pytest.mark.parametrize("code", REFUSED)
def test_swap_sdpa_says_why_it_cannot(code):
    build, reason, hint = REFUSED[code]
    code = code.partition(" ")[0]
    model = build()
    cls = type(model)
    report = pyarch.swap(model, sdpa=True, where=lambda name, layer: False, min_swaps=0)
    record = next(each for each in report.skipped if each.code == code)
    assert record.name == "" and record.reason == reason and hint in record.hint
    assert type(model) is cls and report.swapped == []


def test_swap_sdpa_refuses_a_class_of_fully_shard_by_name():
    class FSDPModule:
        pass

    class FSDPNet(FSDPModule, Net):
        pass

    (record,) = pyarch.swap(FSDPNet(), sdpa=True, min_swaps=0).skipped
    assert record.code == "fully-sharded" and "before fully_shard" in record.hint


def test_swap_sdpa_restore_names_a_class_that_came_later():
    model = Net()
    report = pyarch.swap(model, sdpa=True)
    model.__class__ = type("FSDPNet", (type(model),), {})
    with pytest.raises(RuntimeError, match="layer '' became a FSDPNet after the swap"):
        report.restore()


# -------------------------------------------------------------------------------- stored reports


def test_swap_sdpa_report_is_applied_again():
    model, x = Mixed(), tokens()
    text = pyarch.swap(model, sdpa=True).to_json()
    assert json.loads(text)["swapped"][0]["now"] == NOW
    other = Mixed()
    report = pyarch.apply_report(other, text)
    assert [record.name for record in report.swapped] == ["", "layer"] and count(other, x) == 2
    report.restore()
    assert type(other) is Mixed


def test_swap_sdpa_report_of_another_model_is_refused():
    text = pyarch.swap(Net(), sdpa=True).to_json()
    model = Mixed()
    with pytest.raises(ValueError, match="was a tests.*Net with sdpa=True, this model is a tests.*Mixed"):
        pyarch.apply_report(model, text)
    twice = Net()
    pyarch.swap(twice, sdpa=True)
    with pytest.raises(ValueError, match="cannot be swapped with sdpa=True: its forward runs"):
        pyarch.apply_report(twice, text)
    assert type(model) is Mixed


# -------------------------------------------------------------------------------- verify, explain, observe

PLAIN = "F.scaled_dot_product_attention"


@needs_kernels
def test_swap_sdpa_alone_passes_verify():
    model, x = Net(), tokens()
    pyarch.swap(model, sdpa=True)
    state = copy.deepcopy(model.state_dict())
    with pyarch.backend("cpu"):
        report = pyarch.verify(model, x, timing=False).assert_ok()
    (layer,) = report.layers
    assert (layer.name, layer.calls, layer.forward, layer.backward) == (PLAIN, 2, "cpu", "cpu")
    assert layer.outputs and len(layer.gradients) == 3
    assert count(model, x) == 2
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_swap_sdpa_without_a_kernel_fails_verify_and_says_why():
    model = Net()
    pyarch.swap(model, sdpa=True)
    report = pyarch.verify(model.double(), tokens().double(), timing=False)
    assert not report.ok
    assert any("no layer ran a kernel of ours: " in each and "float64" in each for each in report.problems)


def test_swap_sdpa_wrong_numbers_fail_verify(monkeypatch):
    right = attention.run
    monkeypatch.setattr(
        "pyarch.ops.attention_functions.run", lambda *arguments: 1.01 * right(*arguments), raising=True
    )
    model = Net()
    pyarch.swap(model, sdpa=True)
    problems = pyarch.verify(model, tokens(), timing=False).problems
    assert any(each.startswith(f"layer {PLAIN!r}: output") for each in problems)
    assert any(each.startswith("model: output") for each in problems)


def test_swap_sdpa_is_named_by_verify_of_a_stock_model():
    report = pyarch.verify(Net(), tokens(), timing=False)
    assert not report.ok
    assert (
        "if the model calls F.scaled_dot_product_attention itself: pyarch.swap(model, sdpa=True)"
        in report.notes
    )


def test_swap_sdpa_that_meets_no_call_is_never_called():
    model = nn.Sequential(nn.Linear(4, 4), depthwise(cls=nn.Conv1d))
    pyarch.swap(model, sdpa=True)
    assert pyarch.explain(model, torch.randn(2, 4, 4)).never_called == (PLAIN,)
    report = pyarch.verify(model, torch.randn(2, 4, 4), timing=False)
    assert any(f"never called: {PLAIN}" in note for note in report.notes)


def test_swap_sdpa_is_explained():
    model, x = Mixed(), tokens()
    pyarch.swap(model, sdpa=True)
    with pyarch.backend("reference"):
        explanation = pyarch.explain(model, x)
    assert {choice.layer for choice in explanation.choices} == {PLAIN, "layer"}
    plain = [choice for choice in explanation.choices if choice.layer == PLAIN]
    assert [(each.operation, each.backend) for each in plain] == [
        ("forward", "reference"),
        ("backward", "reference"),
    ]
    assert explanation.never_called == ()


class Broadcast(nn.Module):
    """A call that is torch's alone: a batch that broadcasts."""

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x[:1], x[:1])


def test_swap_sdpa_says_of_a_call_that_it_is_torchs():
    model, x = Broadcast(), torch.randn(2, 3, 5, 8)
    wanted = model(x)
    pyarch.swap(model, sdpa=True)
    torch.testing.assert_close(model(x), wanted)
    (choice,) = pyarch.explain(model, x).choices
    assert (choice.layer, choice.backend) == (PLAIN, "torch")
    assert "torch's own operator runs it directly" in choice.verdicts[0].reason
    (problem,) = pyarch.verify(model, x, timing=False).problems
    assert problem.startswith("no layer ran a kernel of ours: torch: ")


def test_swap_sdpa_is_observed():
    model = Net()
    report = pyarch.swap(model, sdpa=True)
    with report.observe():
        model.first(tokens())
    assert report.never_called == [""]
    with report.observe():
        model(tokens())
    assert report.never_called == []

"""Window attention of other packages, known to swap by name: torchvision's and the one of pyarch.models.swin.

torchvision is not needed: its class stands here under its name, with its constructor and its attributes.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch.models import swin
from tests.attention_modules_cases import each_backend
from tests.compare import check
from tests.swap_cases import operators_of
from tests.whole_models import layout
from tests.window_attention_cases import (
    CASES,
    HEADS,
    RAGGED,
    C,
    compare,
    definition,
    filled,
    results_of,
    weights_of,
)

OPERATOR = "attention"
PACKAGE = "torchvision.models.swin_transformer"


class ShiftedWindowAttention(nn.Module):
    """torchvision's constructor and attributes; it computes the definition."""

    __module__ = PACKAGE

    def __init__(self, dim, window_size, shift_size, num_heads, attention_dropout=0.0, dropout=0.0):
        super().__init__()
        self.window_size, self.shift_size, self.num_heads = list(window_size), list(shift_size), num_heads
        self.attention_dropout, self.dropout = attention_dropout, dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        like = pyarch.nn.WindowAttention(dim, window_size, shift_size, num_heads)
        self.relative_position_bias_table = like.relative_position_bias_table
        self.register_buffer("relative_position_index", like.relative_position_index)

    def forward(self, x: Tensor) -> Tensor:
        return definition(self, x)


class Labelled(ShiftedWindowAttention):
    """Changes nothing of the computation."""

    def extra_repr(self):
        return "labelled"


class Scaled(ShiftedWindowAttention):
    """Computes something else, as torchvision's ShiftedWindowAttentionV2 does."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def of_torchvision(case=RAGGED, cls=ShiftedWindowAttention) -> ShiftedWindowAttention:
    return filled(cls(C, case.window, case.shift, HEADS))


@pytest.mark.parametrize("case", CASES, ids=str)
@each_backend
def test_window_attention_of_torchvision_swapped(backend, case):
    stock, image = of_torchvision(case), case.input()
    ours = copy.deepcopy(stock)
    (record,) = pyarch.swap(ours, backend=backend).swapped
    assert (record.was, record.now) == (f"{PACKAGE}.ShiftedWindowAttention", "pyarch.nn.WindowAttention")
    compare(ours, stock, image)
    assert ("attention_forward", backend) in operators_of(ours, image)


def test_window_attention_of_torchvision_gives_maps():
    stock, image = of_torchvision(), RAGGED.input()
    ours = nn.Sequential(copy.deepcopy(stock))
    pyarch.swap(ours)
    exact = weights_of(copy.deepcopy(stock).double(), image.double())
    check("maps", pyarch.attention_maps(ours, image)["0"], weights_of(stock, image), exact)


def test_window_attention_of_torchvision_loads_into_ours():
    stock, image = of_torchvision(), RAGGED.input()
    ours = pyarch.nn.WindowAttention(C, RAGGED.window, RAGGED.shift, HEADS)
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(image), stock(image))


def test_window_attention_of_torchvision_stays_what_it_is():
    model, image = nn.Sequential(of_torchvision()), RAGGED.input()
    layer, before, layout_before = model[0], model(image), layout(model)
    parameters, written = list(model.parameters()), repr(model)
    report = pyarch.swap(model, rules={"0": pyarch.Config(backend="reference")})
    assert isinstance(layer, ShiftedWindowAttention) and isinstance(layer, pyarch.nn.WindowAttention)
    assert all(mine is yours for mine, yours in zip(model.parameters(), parameters, strict=True))
    assert repr(model) == written
    assert type(copy.deepcopy(model)[0]) is type(layer)
    report.restore()
    assert layout(model) == layout_before and type(layer) is ShiftedWindowAttention
    assert torch.equal(model(image), before)


def test_window_attention_of_a_known_class_pickles_as_that_class():
    """A class that can be found by its name, as torchvision's would be."""
    model = nn.Sequential(swin.WindowAttention(C, HEADS, 4, 2))
    pyarch.swap(model)
    loaded, image = pickle.loads(pickle.dumps(model)), RAGGED.input()
    assert type(loaded[0]) is swin.WindowAttention
    torch.testing.assert_close(loaded(image), model(image))


def test_window_attention_subclass_that_computes_the_same_is_swapped():
    layer, image = of_torchvision(cls=Labelled), RAGGED.input()
    wanted = layer(image)
    pyarch.swap(layer)
    assert isinstance(layer, Labelled) and "labelled" in repr(layer)
    torch.testing.assert_close(layer(image), wanted)


def test_window_attention_subclass_that_computes_something_else_is_left_alone():
    report = pyarch.swap(of_torchvision(cls=Scaled), min_swaps=0)
    assert [(each.code, each.reason) for each in report.skipped] == [
        ("overridden", "Scaled overrides forward")
    ]


def test_window_attention_of_an_unknown_version_is_left_alone():
    def other_forward(self, x, mask=None):
        return x

    version = type("ShiftedWindowAttention", (nn.Module,), {"__module__": PACKAGE, "forward": other_forward})
    bare = type("ShiftedWindowAttention", (nn.Module,), {"__module__": PACKAGE, "forward": lambda self, x: x})
    report = pyarch.swap(nn.Sequential(version(), bare()), min_swaps=0)
    assert [record.code for record in report.skipped] == ["unknown-version"] * 2
    first, second = (record.reason for record in report.skipped)
    assert first == "forward of this ShiftedWindowAttention takes x, mask, needs x"
    assert second.startswith(
        "this ShiftedWindowAttention has no attention_dropout, dropout, num_heads, proj,"
    )


def test_window_attention_of_torchvision_drops_in_training_alone():
    layer, image = of_torchvision(), RAGGED.input()
    wanted = layer(image)
    pyarch.swap(layer)
    layer.attention_dropout = 0.5
    assert not torch.equal(layer(image), layer(image))
    torch.testing.assert_close(layer.eval()(image), wanted)


# -------------------------------------------------------------------------------- the one of the model


@pytest.mark.parametrize("case", [each for each in CASES if len(set(each.window + each.shift)) <= 2], ids=str)
def test_window_attention_of_the_model_is_the_definition(case):
    (window, _), (shift, _) = case.window, case.shift
    layer, image = filled(swin.WindowAttention(C, HEADS, window, shift)).double(), case.input().double()
    ours, wanted = results_of(layer, layer, image), results_of(lambda x: definition(layer, x), layer, image)
    for name, each in wanted.items():
        torch.testing.assert_close(ours[name], each, rtol=1e-10, atol=1e-10)

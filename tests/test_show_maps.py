"""The attention maps of a page: which layers and heads, how large, and why there are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pyarch
from pyarch import models
from pyarch.maps_page import PageMaps, page_maps
from tests.swap_cases import image, net

OPERATOR = "cli"


class Attends(nn.Module):
    def __init__(self, layers: int, idle: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 4, batch_first=True) for _ in range(layers))
        self.idle = idle

    def forward(self, x):
        for layer in [] if self.idle else self.layers:
            x = layer(x, x, x, need_weights=False)[0]
        return x


def test_maps_are_of_layers_spread_over_the_model():
    model, x = Attends(7), torch.randn(3, 5, 8)
    pyarch.swap(model)
    maps = page_maps(model, x, layers=3, heads=2)
    assert list(maps.weights) == ["layers.0", "layers.3", "layers.6"]
    wanted = pyarch.attention_maps(model, x)["layers.3"][0, :2]
    torch.testing.assert_close(torch.tensor(maps.weights["layers.3"]), wanted)
    assert "The first 2 of 4 heads." in maps.notes
    assert list(page_maps(model, x, layers=1).weights) == ["layers.0"]


def test_maps_of_attention_inside_windows():
    torch.manual_seed(0)
    model = models.build("swin", "tiny")
    (x,) = models.load("swin").inputs(models.config("swin", "tiny"), 0)
    pyarch.swap(model)
    weights = page_maps(model, x).weights
    assert list(weights) == [f"stages.{number}.attention" for number in (0, 1, 3, 4)]
    first = torch.tensor(weights["stages.0.attention"])
    assert first.shape == (2, 16, 16)
    torch.testing.assert_close(first.sum(-1), torch.ones(2, 16))


def test_long_maps_are_reduced_to_their_largest_weights(monkeypatch):
    monkeypatch.setattr("pyarch.maps_page.MOST_SIDE", 4)
    model, x = Attends(1), torch.randn(1, 8, 8)
    pyarch.swap(model)
    maps = page_maps(model, x)
    exact = pyarch.attention_maps(model, x)["layers.0"][0]
    torch.testing.assert_close(
        torch.tensor(maps.weights["layers.0"]), exact.unflatten(2, (4, 2)).unflatten(1, (4, 2)).amax((2, 4))
    )
    assert any("reduced to 4" in note for note in maps.notes)


class CallsTorch(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(query=x, key=x, value=x)


@pytest.mark.parametrize("kind", ["module", "block", "function"])
def test_maps_too_large_to_hold_are_left_out(monkeypatch, kind):
    made = {
        "module": lambda: Attends(2),
        "block": lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)),
        "function": CallsTorch,
    }
    model = made[kind]()
    # Three sequences, four heads, five tokens.
    x = torch.randn(3, 4, 5, 8) if kind == "function" else torch.randn(3, 5, 8)
    pyarch.swap(model, sdpa=kind == "function")
    monkeypatch.setattr("pyarch.maps_page.MOST_WEIGHTS", 3 * 4 * 5 * 5)
    assert page_maps(model, x).weights
    monkeypatch.setattr("pyarch.maps_page.MOST_WEIGHTS", 3 * 4 * 5 * 5 - 1)
    left_out = page_maps(model, x)
    assert not left_out.weights and "Left out: a layer has 3.0e+02 weights" in left_out.notes[0]


def test_a_model_whose_attention_gives_no_maps_says_why():
    model = Attends(1, idle=True)
    pyarch.swap(model)
    maps = page_maps(model, torch.randn(1, 8, 8))
    assert not maps.weights and "ran none of its attention" in " ".join(maps.notes)
    assert page_maps(net(), image()) == PageMaps()
    running = Attends(1)
    pyarch.swap(running)
    assert page_maps(running, torch.randn(0, 5, 8)) == PageMaps()


def test_nested_tensors_give_no_maps_and_a_reason():
    class Nests(Attends):
        def forward(self, x):
            ragged = torch.nested.nested_tensor([x[0, :3], x[1, :5]], layout=torch.jagged)
            return super().forward(ragged).values()

    model = Nests(1)
    pyarch.swap(model)
    maps = page_maps(model, torch.randn(2, 5, 8))
    assert not maps.weights and "jagged nested tensors" in maps.notes[0]

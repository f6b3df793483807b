"""Swin beyond what every model must do: how far a layer sees, and the merging of patches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pyarch.models import swin
from tests.model_cases import tiny

OPERATOR = "attention"


def shifts(model: nn.Module) -> list[list[int]]:
    return [module.shift_size for module in model.modules() if isinstance(module, swin.WindowAttention)]


def test_swin_shifts_every_second_layer_by_half_a_window():
    with torch.device("meta"):
        assert shifts(swin.build(swin.REAL)) == [[0, 0], [3, 3]] * 6
    assert shifts(tiny("swin")) == [[0, 0], [2, 2]] * 2


@pytest.mark.parametrize("layers, reached", ((1, 4), (2, 6)))
def test_swin_sees_beyond_a_window_by_the_shift(layers, reached):
    """First rows and columns of 12 x 12 tokens that the first window reaches: itself, then half as far."""
    torch.manual_seed(0)
    model = swin.build(replace(swin.TINY, resolution=48))
    tokens = torch.randn(1, 12, 12, swin.TINY.width)
    other = tokens.clone()
    other[0, :4, :4] += torch.randn(4, 4, swin.TINY.width)
    changed = (model.stages[:layers](other) != model.stages[:layers](tokens)).any(3)[0]
    for along in (0, 1):
        assert changed.any(along).nonzero().flatten().tolist() == list(range(reached))


@pytest.mark.parametrize("height, width", ((4, 6), (5, 4), (3, 3)))
def test_swin_merges_two_by_two_tokens(height, width):
    merging, x = swin.PatchMerging(2), torch.randn(1, height, width, 2)
    with torch.no_grad():
        found = merging(x)
    assert found.shape == (1, -(-height // 2), -(-width // 2), 4)
    last = torch.zeros(2, 2, 2)  # (y, x, features) of the last four tokens, padded with zeros
    corner = x[0, (height - 1) // 2 * 2 :, (width - 1) // 2 * 2 :]
    last[: corner.shape[0], : corner.shape[1]] = corner
    joined = torch.cat([last[0, 0], last[1, 0], last[0, 1], last[1, 1]])
    torch.testing.assert_close(found[0, -1, -1], merging.reduction(merging.norm(joined)))

"""Small models for the tests of swap, and what dispatch chose while they ran."""

from __future__ import annotations

import torch
from torch import nn

from pyarch import dispatch

RECORDED = "depthwise_conv_forward"


class Wide(nn.Conv2d):
    """A user's subclass that changes nothing of the computation."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, groups=channels)
        self.label = "wide"

    def extra_repr(self):
        return f"label={self.label}"


def depthwise(channels=4, cls=nn.Conv2d, **settings):
    return cls(channels, channels, 3, groups=channels, **settings)


def net():
    """Two depthwise layers, one that is not."""
    return nn.Sequential(depthwise(), nn.ReLU(), nn.Conv2d(4, 8, 1), depthwise(8))


def image(channels=4):
    return torch.randn(2, channels, 9, 9)


def operators_of(model, *inputs):
    """The backends that dispatch chose while the model ran, one a layer."""
    chosen = []
    with dispatch.recording(lambda op, call, backend: chosen.append((op.name, backend.name))):
        model(*inputs)
    return chosen

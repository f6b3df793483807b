"""Window attention written out over all pairs of tokens of an image, and the images that the tests give it.

Nothing is rolled or cut: two tokens see each other where they lie in one window of the shifted grid, which is
a torus, and are nearer than a window in the image itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyarch
from pyarch.copies import jitter
from pyarch.tolerance import scale
from tests.compare import check, error

C, HEADS = 12, 3
SAMPLES = 2


@dataclass(frozen=True)
class Case:
    """An image of H x W tokens, the window and the shift."""

    image: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        of = ("x".join(map(str, each)) for each in (self.image, self.window, self.shift))
        return " ".join(of)

    def layer(self, **settings) -> pyarch.nn.WindowAttention:
        return filled(pyarch.nn.WindowAttention(C, self.window, self.shift, HEADS, **settings))

    def input(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, *self.image, C)


CASES = (
    Case((8, 8), (4, 4)),
    Case((8, 8), (4, 4), (2, 2)),
    Case((9, 9), (3, 3), (1, 2)),
    Case((7, 10), (4, 4)),  # padded below and at the right
    Case((7, 10), (4, 4), (2, 2)),
    Case((3, 3), (4, 4), (2, 2)),  # one window holds the image
    Case((4, 4), (4, 4), (2, 2)),
    Case((3, 9), (4, 4), (2, 1)),  # and its height alone
    Case((9, 3), (4, 4), (2, 1)),
    Case((9, 11), (3, 5), (1, 2)),
    Case((10, 6), (5, 3), (4, 2)),
    Case((6, 8), (3, 4), (0, 1)),
    Case((6, 8), (3, 4), (1, 0)),
    Case((5, 4), (1, 1)),
    Case((1, 1), (2, 2), (1, 1)),
    Case((14, 14), (7, 7), (3, 3)),
)
SHIFTED, RAGGED = CASES[1], CASES[4]


def filled(layer: nn.Module) -> nn.Module:
    """The layer with numbers of size 1 in its table, and random ones in what starts at 0."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1 or name.endswith("table"):
                parameter.copy_(torch.randn_like(parameter))
    return layer


def definition(layer: nn.Module, image: Tensor) -> Tensor:
    """What a layer with torchvision's attributes computes of (B, H, W, C), without dropout."""
    _, H, W, _ = image.shape
    weights, value, (tall, broad) = _attention(layer, image)
    output = F.linear((weights @ value).transpose(1, 2).flatten(2), layer.proj.weight, layer.proj.bias)
    return output.view(len(image), tall, broad, -1)[:, :H, :W]


def weights_of(layer: nn.Module, image: Tensor) -> Tensor:
    """The weights of `definition` window by window: (B n, heads, N, N), an image's row by row."""
    with torch.no_grad():
        weights, _, (tall, broad) = _attention(layer, image)
    (high, wide), (down, right) = layer.window_size, _shift(layer, tall, broad)
    windows = []
    for top in range(down, tall + down, high):
        for left in range(right, broad + right, wide):
            rows = torch.arange(top, top + high) % tall
            columns = torch.arange(left, left + wide) % broad
            tokens = (rows[:, None] * broad + columns).flatten()
            windows.append(weights[:, :, tokens][:, :, :, tokens])
    return torch.stack(windows, 1).flatten(0, 1)


def _attention(layer: nn.Module, image: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Weights (B, heads, P, P) and values (B, heads, P, D) of the P tokens of the padded image; its size."""
    (high, wide), heads = layer.window_size, layer.num_heads
    _, H, W, _ = image.shape
    x = F.pad(image, (0, 0, 0, -W % wide, 0, -H % high))
    tall, broad = x.shape[1:3]
    down, right = _shift(layer, tall, broad)

    y_place, x_place = torch.meshgrid(torch.arange(tall), torch.arange(broad), indexing="ij")
    y_place, x_place = y_place.flatten(), x_place.flatten()
    window = (y_place - down) % tall // high * broad + (x_place - right) % broad // wide
    y_apart, x_apart = y_place[:, None] - y_place, x_place[:, None] - x_place
    seen = (window[:, None] == window) & (y_apart.abs() < high) & (x_apart.abs() < wide)
    row = (y_apart + high - 1) * (2 * wide - 1) + x_apart + wide - 1
    bias = layer.relative_position_bias_table[row.where(seen, 0)].permute(2, 0, 1)

    product = F.linear(x.flatten(1, 2), layer.qkv.weight, layer.qkv.bias)
    query, key, value = product.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5 + bias
    return scores.masked_fill(~seen, -torch.inf).softmax(3), value, (tall, broad)


def _shift(layer: nn.Module, tall: int, broad: int) -> tuple[int, int]:
    """Down and right; 0 where one window holds the padded image."""
    (high, wide), (down, right) = layer.window_size, layer.shift_size
    return down if tall > high else 0, right if broad > wide else 0


def results_of(function, layer: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """The output of `function(image)`, and the gradients of the image and of the layer's parameters."""
    layer.zero_grad()
    image = image.detach().clone().requires_grad_()
    output = function(image)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    output.backward(cotangent.to(output.dtype))
    gradients = {name: each.grad for name, each in layer.named_parameters()}
    return {"output": output.detach(), "image": image.grad, **gradients}


def compare(ours: nn.Module, stock: nn.Module, image: Tensor) -> None:
    """Hold a layer's output and gradients to the rule of tests/compare.py.

    torch's error is the largest of a few runs of the definition, on the parameters of `stock` and on each of
    them off by up to one rounding: a table's gradient is a few sums, of which one run may be right by luck.
    """
    exact = copy.deepcopy(stock).double()
    truth = results_of(lambda x: definition(exact, x), exact, image.double())
    runs = []
    for layer in (stock, *(jitter(copy.deepcopy(stock)) for _ in range(SAMPLES))):
        runs.append(results_of(lambda x, layer=layer: definition(layer, x), layer, image))
    check_results(results_of(ours, ours, image), runs, truth)


def check_results(ours: dict[str, Tensor], stocks: list[dict[str, Tensor]], truth: dict[str, Tensor]) -> None:
    """Hold an output and gradients to the rule, beside the worst of several runs of torch's."""
    assert ours.keys() == truth.keys()
    largest = max(scale(each) for name, each in truth.items() if name != "output")
    for name, wanted in truth.items():
        worst = max((each[name] for each in stocks), key=lambda result: error(result, wanted))
        check(name, ours[name], worst, wanted, 0.0 if name == "output" else largest)

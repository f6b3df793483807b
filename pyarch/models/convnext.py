"""ConvNeXt: a residual network of 7x7 depthwise convolutions.

Z. Liu, H. Mao, C.-Y. Wu, C. Feichtenhofer, T. Darrell, S. Xie. A ConvNet for the 2020s. 2022,
arXiv:2201.03545.

    block(x) = x + scale * W2 gelu(W1 layernorm(depthwise7x7(x)))

Shown: large two-dimensional kernels. The block mixes channels on (N, H, W, C), so that its output, permuted
back, has channels-last strides: the convolution meets both memory formats.

N images, C channels, H x W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gratings import classification


@dataclass(frozen=True)
class Config:
    """Sizes of a ConvNeXt; `layer_scale` is the initial scale of each block's branch."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    kernel: int
    classes: int
    batch: int
    resolution: int
    # The paper starts at 1e-6, where an untrained block adds nothing and a wrong convolution would go unseen.
    layer_scale: float = 0.1


# ConvNeXt-T of the paper, at its resolution.
REAL = Config(depths=(3, 3, 9, 3), widths=(96, 192, 384, 768), kernel=7, classes=8, batch=1, resolution=224)
TINY = Config(depths=(1, 1), widths=(16, 24), kernel=7, classes=4, batch=8, resolution=32)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise convolution, then a two-layer perceptron over the channels, on a scaled residual branch."""

    def __init__(self, width: int, kernel: int, layer_scale: float):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)  # (N, H, W, C)
        y = self.scale * self.project(F.gelu(self.expand(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patches of 4x4 pixels, stages of blocks with 2x2 reductions between them, a linear classifier."""

    def __init__(self, config: Config):
        super().__init__()
        first, last = config.widths[0], config.widths[-1]
        layers: list[nn.Module] = [nn.Conv2d(3, first, 4, stride=4), ChannelNorm(first, eps=1e-6)]
        previous = first
        for depth, width in zip(config.depths, config.widths, strict=True):
            if width != previous:
                layers += [ChannelNorm(previous, eps=1e-6), nn.Conv2d(previous, width, 2, stride=2)]
            layers += [Block(width, config.kernel, config.layer_scale) for _ in range(depth)]
            previous = width
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(last, eps=1e-6)
        self.classifier = nn.Linear(last, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to scores (N, classes)."""
        return self.classifier(self.norm(self.features(images).mean((2, 3))))


def build(config: Config) -> nn.Module:
    """Return a ConvNeXt with torch's default initialisation."""
    return ConvNeXt(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((images,), labels): tell the direction of stripes."""
    images, target = classification(config.batch, config.resolution, config.classes, seed)
    return (images,), target


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (images,), of shape (batch, 3, resolution, resolution)."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, classes) and labels (N,)."""
    return F.cross_entropy(output, target)

"""DeepLabv3+ head: atrous spatial pyramid pooling with depthwise-separable convolutions, and its decoder.

L.-C. Chen, Y. Zhu, G. Papandreou, F. Schroff, H. Adam. Encoder-Decoder with Atrous Separable Convolution for
Semantic Image Segmentation. 2018, arXiv:1802.02611.

    pyramid(x) = project([pointwise(x), separable_rate(x) for each rate, pooled(x)])
    decoder    = classify(separable(separable([upsample(pyramid(deep)), reduce(shallow)])))

Shown: 3x3 depthwise convolutions dilated by 6, 12 and 18, whose taps mostly fall into the padding of a small
map. The backbone is a stand-in (a patch convolution, a pooled 1x1 convolution) that gives the head its two
inputs, so that the head's own layers are what is measured.

N images, C channels, H x W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gratings import segmentation


@dataclass(frozen=True)
class Config:
    """Sizes of the head: channels of its inputs at strides 4 (shallow) and 16 (deep), and within."""

    shallow: int
    deep: int
    reduced: int
    width: int
    rates: tuple[int, ...]
    classes: int
    batch: int
    resolution: int


# The paper's head over a backbone of 2048 channels.
REAL = Config(
    shallow=256, deep=2048, reduced=48, width=256, rates=(6, 12, 18), classes=8, batch=2, resolution=256
)
TINY = Config(shallow=16, deep=24, reduced=8, width=16, rates=(2, 4), classes=4, batch=4, resolution=64)


def convolution(inputs: int, outputs: int, kernel: int = 1, rate: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the size, its batch normalisation and a ReLU."""
    padding = rate * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=rate, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def separable(inputs: int, outputs: int, rate: int = 1) -> nn.Sequential:
    """Return a 3x3 depthwise convolution at an atrous rate, and a 1x1 convolution."""
    return nn.Sequential(convolution(inputs, inputs, 3, rate, groups=inputs), convolution(inputs, outputs))


class Pyramid(nn.Module):
    """The same features seen at several atrous rates and as one average, projected together."""

    def __init__(self, inputs: int, width: int, rates: tuple[int, ...]):
        super().__init__()
        self.branches = nn.ModuleList(
            [convolution(inputs, width), *(separable(inputs, width, rate) for rate in rates)]
        )
        # No batch normalisation here: it would see one value an image, and small batches are what is shown.
        self.pooled = nn.Sequential(nn.Conv2d(inputs, width, 1), nn.ReLU())
        self.project = convolution((len(rates) + 2) * width, width)

    def forward(self, x: Tensor) -> Tensor:
        views = [branch(x) for branch in self.branches]
        views.append(self.pooled(x.mean((2, 3), keepdim=True)).expand_as(views[0]))
        return self.project(torch.cat(views, 1))


class DeepLabHead(nn.Module):
    """Stand-in backbone, atrous pyramid on its deep features, decoder with its shallow ones."""

    def __init__(self, config: Config):
        super().__init__()
        self.shallow = nn.Sequential(nn.Conv2d(3, config.shallow, 4, stride=4), nn.ReLU())
        self.deep = nn.Sequential(nn.AvgPool2d(4), convolution(config.shallow, config.deep))
        self.pyramid = Pyramid(config.deep, config.width, config.rates)
        self.reduce = convolution(config.shallow, config.reduced)
        self.refine = nn.Sequential(
            separable(config.width + config.reduced, config.width), separable(config.width, config.width)
        )
        self.classify = nn.Conv2d(config.width, config.classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to scores (N, classes, H, W)."""
        shallow = self.shallow(images)
        pyramid = self.pyramid(self.deep(shallow))
        pyramid = F.interpolate(pyramid, size=shallow.shape[2:], mode="bilinear")
        scores = self.classify(self.refine(torch.cat([pyramid, self.reduce(shallow)], 1)))
        return F.interpolate(scores, size=images.shape[2:], mode="bilinear")


def build(config: Config) -> nn.Module:
    """Return the head on its stand-in backbone, with torch's default initialisation."""
    return DeepLabHead(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((images,), label maps): tell the direction of stripes at every pixel."""
    images, target = segmentation(config.batch, config.resolution, config.classes, seed)
    return (images,), target


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (images,), of shape (batch, 3, resolution, resolution)."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, classes, H, W) and label maps (N, H, W)."""
    return F.cross_entropy(output, target)

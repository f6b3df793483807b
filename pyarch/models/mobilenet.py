"""MobileNetV2: inverted residuals around 3x3 depthwise convolutions.

M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen. MobileNetV2: Inverted Residuals and Linear
Bottlenecks. 2018, arXiv:1801.04381.

    block(x) = [x +] project(relu6(depthwise3x3(relu6(expand(x)))))    batch-normalised after each convolution

Shown: small kernels, stride 1 and 2, over many channels, where depthwise convolution is bound by memory.

N images, C channels, H x W pixels.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from .gratings import classification


@dataclass(frozen=True)
class Config:
    """Sizes of a MobileNetV2; a stage is (expansion, width, blocks, stride of the first block)."""

    stem: int
    stages: tuple[tuple[int, int, int, int], ...]
    head: int
    classes: int
    batch: int
    resolution: int


# Width 1.0 of the paper (table 2), at its resolution.
REAL = Config(
    stem=32,
    stages=(
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ),
    head=1280,
    classes=8,
    batch=4,
    resolution=224,
)
TINY = Config(stem=8, stages=((1, 8, 1, 1), (4, 16, 2, 2)), head=32, classes=4, batch=8, resolution=32)


def normalised(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the size (but for its stride) and its batch normalisation."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; add the input where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*normalised(inputs, hidden, 1), nn.ReLU6()]
        layers += [*normalised(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        layers += normalised(hidden, outputs, 1)
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """A strided 3x3 stem, stages of inverted residuals, a 1x1 head, a linear classifier."""

    def __init__(self, config: Config):
        super().__init__()
        layers: list[nn.Module] = [*normalised(3, config.stem, 3, stride=2), nn.ReLU6()]
        previous = config.stem
        for expansion, width, blocks, stride in config.stages:
            for index in range(blocks):
                layers.append(InvertedResidual(previous, width, expansion, stride if index == 0 else 1))
                previous = width
        layers += [*normalised(previous, config.head, 1), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(config.head, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to scores (N, classes)."""
        return self.classifier(self.features(images).mean((2, 3)))


def build(config: Config) -> nn.Module:
    """Return a MobileNetV2 with torch's default initialisation."""
    return MobileNetV2(config)


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

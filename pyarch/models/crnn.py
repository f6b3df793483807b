"""CRNN: a convolutional network whose columns a bidirectional LSTM reads as a text line.

B. Shi, X. Bai, C. Yao. An End-to-End Trainable Neural Network for Image-based Sequence Recognition and Its
Application to Scene Text Recognition. 2015, arXiv:1507.05717.

    scores = W bilstm(V bilstm(columns(convolutions(image)))) + b,    trained by the loss of ctc.py

Shown: few time steps behind a heavy convolutional front, so that little of the time is the recurrence's.

N images, T columns, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .ctc import ctc_loss
from .digits import strips

# Of each convolution: kernel, whether batch normalisation follows, and the pooling after it. Later poolings
# halve the height alone, because letters are narrow; 32 rows become one.
LAYOUT = (
    (3, False, (2, 2)),
    (3, False, (2, 2)),
    (3, False, None),
    (3, False, (2, 1)),
    (3, True, None),
    (3, True, (2, 1)),
    (2, False, None),
)
HEIGHT = 32


@dataclass(frozen=True)
class Config:
    """Sizes of a CRNN: one width for each row of LAYOUT, hidden units of one direction, pixels, digits."""

    widths: tuple[int, ...]
    hidden: int
    classes: int
    batch: int
    columns: int
    places: int


# The paper's network and image size; ten digits and the blank.
REAL = Config(
    widths=(64, 128, 256, 256, 512, 512, 512), hidden=256, classes=11, batch=8, columns=100, places=5
)
TINY = Config(widths=(8, 16, 16, 16, 24, 24, 24), hidden=16, classes=4, batch=16, columns=36, places=2)


class CRNN(nn.Module):
    """Convolutions to one row of features, two bidirectional LSTM layers, a linear classifier of columns."""

    def __init__(self, config: Config):
        super().__init__()
        layers: list[nn.Module] = []
        previous = 1
        for width, (kernel, normalised, pool) in zip(config.widths, LAYOUT, strict=True):
            layers.append(nn.Conv2d(previous, width, kernel, padding=1 if kernel == 3 else 0))
            layers += [nn.BatchNorm2d(width)] if normalised else []
            layers.append(nn.ReLU())
            layers += [nn.MaxPool2d(pool)] if pool else []
            previous = width
        self.convolutions = nn.Sequential(*layers)
        self.lower = nn.LSTM(previous, config.hidden, bidirectional=True)
        self.between = nn.Linear(2 * config.hidden, config.hidden)
        self.upper = nn.LSTM(config.hidden, config.hidden, bidirectional=True)
        self.classifier = nn.Linear(2 * config.hidden, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1, 32, W) to scores (W / 4 - 1, N, classes), class 0 the blank."""
        features = self.convolutions(images)  # (N, C, 1, T)
        hidden, _ = self.lower(features.squeeze(2).permute(2, 0, 1))
        hidden, _ = self.upper(self.between(hidden))
        return self.classifier(hidden)


def build(config: Config) -> nn.Module:
    """Return a CRNN with torch's default initialisation."""
    return CRNN(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((images,), labels): read digits below `classes` - 1; labels (N, places), filled up with 0."""
    images, target = strips(config.batch, HEIGHT, config.columns, config.places, config.classes - 1, seed)
    return (images,), target


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (images,), of shape (batch, 1, 32, columns)."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean CTC loss for each digit of scores (T, N, classes) and labels (N, places)."""
    T, N, _ = output.shape
    return ctc_loss(output, torch.full((N,), T), target)

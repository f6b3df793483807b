"""Conformer: attention and long convolutions over speech frames, between two half steps of feed-forward.

A. Gulati, J. Qin, C.-C. Chiu, N. Parmar, Y. Zhang, J. Yu, W. Han, S. Wang, Z. Zhang, Y. Wu, R. Pang.
Conformer: Convolution-augmented Transformer for Speech Recognition. 2020, arXiv:2005.08100.

    a     = x + ffn(x) / 2                     ffn(x)  = linear(silu(linear(layernorm(x))))
    b     = a + attention(layernorm(a))
    c     = b + conv(b)                        conv(x) = pointwise(silu(batchnorm(depthwise31(glu(
    block = layernorm(c + ffn(c) / 2)                        pointwise(layernorm(x))))))

Shown: attention and long one-dimensional kernels in one model. The paper adds relative positions to its
attention, which torch's layer has not; as in torchaudio's Conformer, the convolutions alone tell the order.

N utterances, T frames, F features a frame, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes of the stack; `kernel` is odd, so that frames keep their place."""

    features: int
    width: int
    heads: int
    layers: int
    kernel: int
    classes: int
    batch: int
    frames: int


# Widths of the paper's Conformer (M), 2 of its 16 layers, 80 filterbanks, ten seconds of 10 ms frames; its
# kernel of 32 is 31 in the implementations in use.
REAL = Config(features=80, width=256, heads=4, layers=2, kernel=31, classes=16, batch=1, frames=1000)
TINY = Config(features=8, width=16, heads=2, layers=2, kernel=31, classes=4, batch=4, frames=75)

HELD = 25  # frames


def feed_forward(width: int) -> nn.Sequential:
    """Return the branch of a feed-forward module, four times as wide inside."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
    )


class ConvolutionModule(nn.Module):
    """Gated pointwise, depthwise over time, and pointwise convolution."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.expand = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, kernel, padding="same", groups=width, bias=False)
        self.batch_norm = nn.BatchNorm1d(width)
        self.project = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm(x).transpose(1, 2)  # (N, C, T)
        y = self.depthwise(F.glu(self.expand(y), dim=1))
        return self.project(F.silu(self.batch_norm(y))).transpose(1, 2)


class Block(nn.Module):
    """Half a feed-forward, attention, convolution, the other half; each on a residual branch."""

    def __init__(self, width: int, heads: int, kernel: int):
        super().__init__()
        self.first_half = feed_forward(width)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.convolution = ConvolutionModule(width, kernel)
        self.second_half = feed_forward(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.first_half(x)
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.convolution(x)
        return self.norm(x + 0.5 * self.second_half(x))


class Conformer(nn.Module):
    """A linear front, the blocks, a linear classifier of every frame."""

    def __init__(self, config: Config):
        super().__init__()
        self.front = nn.Linear(config.features, config.width)
        self.blocks = nn.Sequential(
            *(Block(config.width, config.heads, config.kernel) for _ in range(config.layers))
        )
        self.classifier = nn.Linear(config.width, config.classes)

    def forward(self, frames: Tensor) -> Tensor:
        """Map frames (N, T, F) to scores (N, T, classes)."""
        return self.classifier(self.blocks(self.front(frames)))


def build(config: Config) -> nn.Module:
    """Return a Conformer with torch's default initialisation."""
    return Conformer(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((frames,), labels): name the sound held at every frame, which one frame alone does not tell.

    Sound k raises feature k by one standard deviation of the noise, and lasts HELD frames.
    """
    generator = torch.Generator().manual_seed(seed)
    sounds = torch.randint(config.classes, (config.batch, config.frames // HELD + 1), generator=generator)
    target = sounds.repeat_interleave(HELD, dim=1)[:, : config.frames]
    noise = torch.randn(config.batch, config.frames, config.features, generator=generator)
    return (noise + F.one_hot(target, config.features),), target


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (frames,), of shape (batch, frames, features)."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, T, classes) and labels (N, T)."""
    return F.cross_entropy(output.transpose(1, 2), target)

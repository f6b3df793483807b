"""CvT: a Transformer whose queries, keys and values come from depthwise-separable convolutions.

H. Wu, B. Xiao, N. Codella, M. Liu, X. Dai, L. Yuan, L. Zhang. CvT: Introducing Convolutions to Vision
Transformers. 2021, arXiv:2103.15808.

    stage  = block^n(norm(convolution(x)))          fewer places and more channels in each stage
    block  = a + ffn(norm(a)),   a = x + attention(q(y), k(y), v(y)),   y = norm(x)
    q      = W batchnorm(depthwise3x3(y))           k and v alike with stride 2: a quarter of the keys
    scores = C norm(x)_0 + c                        of the class token, which the last stage begins with

Shown: both kinds of layer at once, the pointwise half of each separable convolution being the projection W
inside nn.MultiheadAttention; attention with fewer keys than queries. The convolutions tell the order, so that
there are no positions. Of the paper only stochastic depth is left out.

N images, C channels, H x W places.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gratings import classification


@dataclass(frozen=True)
class Stage:
    """Kernel, stride and padding of the convolution that starts a stage; its width, heads and blocks."""

    kernel: int
    stride: int
    padding: int
    width: int
    heads: int
    blocks: int


@dataclass(frozen=True)
class Config:
    """Sizes of a CvT."""

    stages: tuple[Stage, ...]
    classes: int
    batch: int
    resolution: int


# CvT-13 of the paper, 2 of the 10 blocks of its last stage, at its resolution.
REAL = Config(
    stages=(
        Stage(kernel=7, stride=4, padding=2, width=64, heads=1, blocks=1),
        Stage(kernel=3, stride=2, padding=1, width=192, heads=3, blocks=2),
        Stage(kernel=3, stride=2, padding=1, width=384, heads=6, blocks=2),
    ),
    classes=8,
    batch=1,
    resolution=224,
)
TINY = Config(
    stages=(
        Stage(kernel=7, stride=4, padding=2, width=16, heads=1, blocks=1),
        Stage(kernel=3, stride=2, padding=1, width=24, heads=3, blocks=1),
    ),
    classes=4,
    batch=8,
    resolution=32,
)

KEY_STRIDE = 2


def depthwise(width: int, stride: int) -> nn.Sequential:
    """Return a 3x3 depthwise convolution and its batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False), nn.BatchNorm2d(width)
    )


class Block(nn.Module):
    """Attention between convolved tokens, feed-forward; each on a residual branch, normalised before."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.query = depthwise(width, stride=1)
        self.key = depthwise(width, KEY_STRIDE)
        self.value = depthwise(width, KEY_STRIDE)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, token: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Map class tokens (N, 0 or 1, C) and places (N, C, H, W) to new ones."""
        size = places.shape[2:]
        x = joined(token, places)
        y = self.attention_norm(x)
        token, places = parted(y, size)
        q, k, v = (joined(token, convolve(places)) for convolve in (self.query, self.key, self.value))
        x = x + self.attention(q, k, v, need_weights=False)[0]
        return parted(x + self.feed_forward(self.norm(x)), size)


def joined(token: Tensor, places: Tensor) -> Tensor:
    """Return class tokens (N, 0 or 1, C) and places (N, C, H, W) as one sequence (N, [1 +] H W, C)."""
    return torch.cat([token, places.flatten(2).transpose(1, 2)], 1)


def parted(x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Undo `joined` for places of that size."""
    tokens = x.shape[1] - size[0] * size[1]
    return x[:, :tokens], x[:, tokens:].transpose(1, 2).unflatten(2, size)


class Embedding(nn.Module):
    """A strided convolution, normalised over its channels."""

    def __init__(self, inputs: int, stage: Stage):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, stage.width, stage.kernel, stage.stride, stage.padding)
        self.norm = nn.LayerNorm(stage.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CvT(nn.Module):
    """Stages of an embedding and its blocks, a class token for the last, a linear classifier."""

    def __init__(self, config: Config):
        super().__init__()
        widths = [3, *(stage.width for stage in config.stages)]
        self.embeddings = nn.ModuleList(map(Embedding, widths, config.stages))
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(stage.width, stage.heads) for _ in range(stage.blocks))
            for stage in config.stages
        )
        self.class_token = nn.Parameter(torch.randn(1, 1, widths[-1]))
        self.norm = nn.LayerNorm(widths[-1])
        self.classifier = nn.Linear(widths[-1], config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to scores (N, classes)."""
        x = images
        for embedding, blocks in zip(self.embeddings, self.stages, strict=True):
            x = embedding(x)
            last = blocks is self.stages[-1]
            token = self.class_token[:, : int(last), : x.shape[1]].expand(len(x), -1, -1)
            for block in blocks:
                token, x = block(token, x)
        return self.classifier(self.norm(token[:, 0]))


def build(config: Config) -> nn.Module:
    """Return a CvT with torch's default initialisation of its layers."""
    return CvT(config)


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

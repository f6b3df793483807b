"""TimeSformer: video by attention over time and attention over space, in turns.

G. Bertasius, H. Wang, L. Torresani. Is Space-Time Attention All You Need for Video Understanding? 2021,
arXiv:2102.05095 (divided space-time attention).

    a      = x + W attention(norm(x))      over the T frames of each patch, the class token left out
    b      = a + attention(norm(a))        over the class token and the S patches of each frame
    layer  = b + ffn(norm(b))
    scores = C norm(x)_0 + c               of the class token, which is the mean over the frames after each b

Shown: nn.MultiheadAttention over many short sequences: T frames long over time, S patches over space, where
attention over all T S patches at once would cost S times and T times as much.

N videos, T frames, S patches of a frame, C features of a patch, H x W pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .digits import NOISE, glyphs


@dataclass(frozen=True)
class Config:
    """Sizes of a TimeSformer; `patch` divides `resolution`, both in pixels."""

    patch: int
    width: int
    heads: int
    hidden: int
    layers: int
    classes: int
    batch: int
    frames: int
    resolution: int


# TimeSformer of the paper, 2 of its 12 layers, its eight frames at half its resolution.
REAL = Config(
    patch=16,
    width=768,
    heads=12,
    hidden=3072,
    layers=2,
    classes=8,
    batch=1,
    frames=8,
    resolution=112,
)
TINY = Config(patch=8, width=32, heads=4, hidden=64, layers=2, classes=2, batch=16, frames=4, resolution=32)

STEP = 8  # pixels that a digit moves from frame to frame


class Layer(nn.Module):
    """Attention over time, then over space, then feed-forward; each on a normalised residual branch."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.time_norm = nn.LayerNorm(width, eps=1e-6)
        self.time_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.time_project = nn.Linear(width, width)
        self.space_norm = nn.LayerNorm(width, eps=1e-6)
        self.space_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, token: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Map the class token (N, 1, C) and patches (N, T, S, C) to new ones."""
        N, T, S, _ = patches.shape
        y = self.time_norm(patches.transpose(1, 2).flatten(0, 1))  # (N S, T, C)
        y, _ = self.time_attention(y, y, y, need_weights=False)
        patches = patches + self.time_project(y).unflatten(0, (N, S)).transpose(1, 2)

        y = torch.cat([token.unsqueeze(1).expand(-1, T, -1, -1), patches], 2)
        y = self.space_norm(y.flatten(0, 1))  # (N T, 1 + S, C)
        y, _ = self.space_attention(y, y, y, need_weights=False)
        y = y.unflatten(0, (N, T))
        token, patches = token + y[:, :, :1].mean(1), patches + y[:, :, 1:]

        return tuple(x + self.feed_forward(self.norm(x)) for x in (token, patches))


class TimeSformer(nn.Module):
    """Patches of every frame, a class token, positions in space and in time, the layers, a classifier."""

    def __init__(self, config: Config):
        super().__init__()
        patches = (config.resolution // config.patch) ** 2
        self.embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.places = nn.Parameter(torch.randn(1 + patches, config.width))
        self.times = nn.Parameter(torch.randn(config.frames, 1, config.width))
        self.layers = nn.ModuleList(
            Layer(config.width, config.heads, config.hidden) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.classifier = nn.Linear(config.width, config.classes)

    def forward(self, videos: Tensor) -> Tensor:
        """Map videos (N, T, 3, H, W) to scores (N, classes)."""
        N, T = videos.shape[:2]
        patches = self.embedding(videos.flatten(0, 1)).flatten(2).transpose(1, 2)  # (N T, S, C)
        patches = patches.unflatten(0, (N, T)) + self.places[1:] + self.times[:T]
        token = (self.class_token + self.places[:1]).expand(N, -1, -1)
        for layer in self.layers:
            token, patches = layer(token, patches)
        return self.classifier(self.norm(token[:, 0]))


def build(config: Config) -> nn.Module:
    """Return a TimeSformer with torch's default initialisation of its layers.

    The paper's code starts `time_project` at zero, where a wrong attention over time would go unseen.
    """
    return TimeSformer(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((videos,), labels): name the line along which a digit moves, one of `classes` directions.

    It starts anywhere and comes back where it leaves the picture, so that no single frame tells the line.
    """
    generator = torch.Generator().manual_seed(seed)
    N, T, size = config.batch, config.frames, config.resolution
    target = torch.randperm(N, generator=generator) % config.classes
    ink = glyphs()
    canvas = torch.zeros(len(ink), size, size)
    canvas[:, : ink.shape[1], : ink.shape[2]] = ink
    digit = torch.randint(len(ink), (N, 1, 1, 1), generator=generator)
    angle = math.pi * target / config.classes
    step = (STEP * torch.stack([angle.sin(), angle.cos()])).round().long()
    start = torch.randint(size, (2, N, 1), generator=generator)
    down, right = start + step.unsqueeze(2) * torch.arange(T)  # (N, T) each
    row = (torch.arange(size) - down.unsqueeze(2)) % size
    column = (torch.arange(size) - right.unsqueeze(2)) % size
    frames = canvas[digit, row.unsqueeze(3), column.unsqueeze(2)]  # (N, T, H, W)
    noise = NOISE * torch.randn(N, T, 3, size, size, generator=generator)
    return (frames.unsqueeze(2) + noise,), target


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (videos,), of shape (batch, frames, 3, resolution, resolution)."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, classes) and labels (N,)."""
    return F.cross_entropy(output, target)

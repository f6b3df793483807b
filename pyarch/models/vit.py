"""ViT: an image as a sentence of patches, read by a Transformer encoder.

A. Dosovitskiy, L. Beyer, A. Kolesnikov, D. Weissenborn, X. Zhai, T. Unterthiner, M. Dehghani, M. Minderer,
G. Heigold, S. Gelly, J. Uszkoreit, N. Houlsby. An Image is Worth 16x16 Words: Transformers for Image
Recognition at Scale. 2020, arXiv:2010.11929.

    x      = [class token, E patch_1 .. E patch_S] + positions
    layer  = y + ffn(norm(y)),   y = x + attention(norm(x))
    scores = C norm(x)_0 + c                                    of the class token, which sees all patches

Shown: nn.TransformerEncoderLayer with normalisation first, without any mask.

N images, S patches of an image, P pixels along a patch, H x W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gratings import classification


@dataclass(frozen=True)
class Config:
    """Sizes of a ViT; `patch` divides `resolution`, both in pixels."""

    patch: int
    width: int
    heads: int
    hidden: int
    layers: int
    dropout: float
    classes: int
    batch: int
    resolution: int


# ViT-B/16 of the paper, 2 of its 12 layers, at the resolution that it was first trained at.
REAL = Config(
    patch=16,
    width=768,
    heads=12,
    hidden=3072,
    layers=2,
    dropout=0.1,
    classes=8,
    batch=2,
    resolution=224,
)
TINY = Config(
    patch=8, width=32, heads=4, hidden=64, layers=2, dropout=0.0, classes=4, batch=16, resolution=32
)

SPREAD = 0.02  # deviation of the first positions


class ViT(nn.Module):
    """Patches by a strided convolution, a class token, learned positions, encoder layers, a classifier."""

    def __init__(self, config: Config):
        super().__init__()
        patches = (config.resolution // config.patch) ** 2
        self.embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions = nn.Parameter(SPREAD * torch.randn(1, 1 + patches, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    config.width,
                    config.heads,
                    config.hidden,
                    config.dropout,
                    activation="gelu",
                    layer_norm_eps=1e-6,
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(config.layers)
            )
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.classifier = nn.Linear(config.width, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to scores (N, classes)."""
        patches = self.embedding(images).flatten(2).transpose(1, 2)  # (N, S, width)
        x = torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1)
        x = self.layers(self.dropout(x + self.positions))
        return self.classifier(self.norm(x[:, 0]))


def build(config: Config) -> nn.Module:
    """Return a ViT with torch's default initialisation of its layers."""
    return ViT(config)


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

"""A Transformer encoder that classifies sentences of unequal length.

A. Vaswani, N. Shazeer, N. Parmar, J. Uszkoreit, L. Jones, A. N. Gomez, L. Kaiser, I. Polosukhin. Attention Is
All You Need. 2017, arXiv:1706.03762.
J. Devlin, M.-W. Chang, K. Lee, K. Toutanova. BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding. 2018, arXiv:1810.04805 (learned positions, GELU, a first word that stands for all).

    x_t    = sqrt(W) E word_t + position_t
    layer  = norm(y + ffn(y)),   y = norm(x + attention(x))
    scores = C x_0 + c                                     of the first word, which sees the whole sentence

Shown: nn.TransformerEncoderLayer under a padding mask. The positions are sines, or learned:

    position_t[2 i], position_t[2 i + 1] = sin, cos(t / 10000^(2 i / W))

N sentences, T words at most, W width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sentences import beyond, ragged


@dataclass(frozen=True)
class Config:
    """Sizes of the classifier; `positions` is "sinusoidal" or "learned"."""

    vocabulary: int
    width: int
    heads: int
    hidden: int
    layers: int
    dropout: float
    classes: int
    batch: int
    words: int
    positions: str = "sinusoidal"


# The base model of Vaswani et al., 2 of its 6 layers, and a vocabulary of 10,000 words.
REAL = Config(
    vocabulary=10_000,
    width=512,
    heads=8,
    hidden=2048,
    layers=2,
    dropout=0.1,
    classes=5,
    batch=4,
    words=128,
)
TINY = Config(
    vocabulary=16, width=32, heads=4, hidden=64, layers=2, dropout=0.0, classes=4, batch=32, words=11
)

LONGEST_WAVE = 10_000  # words / 2 pi


class SinusoidalPositions(nn.Module):
    """A constant wave for each two features, from one of 2 pi words to one of 2 pi LONGEST_WAVE words."""

    def __init__(self, words: int, width: int):
        super().__init__()
        pace = torch.exp(torch.arange(0, width, 2) * (-math.log(LONGEST_WAVE) / width))
        phase = torch.arange(words).unsqueeze(1) * pace
        waves = torch.stack([phase.sin(), phase.cos()], 2).flatten(1)[:, :width]
        self.register_buffer("waves", waves, persistent=False)

    def forward(self, T: int) -> Tensor:
        return self.waves[:T]


class LearnedPositions(nn.Module):
    """One vector for each place."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.places = nn.Parameter(torch.randn(words, width))

    def forward(self, T: int) -> Tensor:
        return self.places[:T]


POSITIONS = {"sinusoidal": SinusoidalPositions, "learned": LearnedPositions}


class Classifier(nn.Module):
    """Embedding and positions, encoder layers, a linear classifier of the first word."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = POSITIONS[config.positions](config.words, config.width)
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, config.hidden, config.dropout, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.layers)
        self.classifier = nn.Linear(config.width, config.classes)
        # With the root of the width in front of it, of the size of the positions.
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Map words (N, T) int64 and lengths (N,) int64 to scores (N, classes)."""
        T, width = words.shape[1], self.embedding.embedding_dim
        x = self.dropout(math.sqrt(width) * self.embedding(words) + self.positions(T))
        x = self.encoder(x, src_key_padding_mask=beyond(lengths, T))
        return self.classifier(x[:, 0])


def build(config: Config) -> nn.Module:
    """Return a classifier with torch's default initialisation of its layers."""
    return Classifier(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return ((words, lengths), labels): name the one key word, wherever after the first word it stands.

    Words below `classes` are key words, and the padding is full of them.
    """
    generator = torch.Generator().manual_seed(seed)
    words, lengths = ragged(config.batch, config.words, config.vocabulary - config.classes, generator)
    words += config.classes
    target = torch.randint(config.classes, (config.batch,), generator=generator)
    place = 1 + (torch.rand(config.batch, generator=generator) * (lengths - 1)).long()
    words[torch.arange(config.batch), place] = target
    return (torch.where(beyond(lengths, config.words), words % config.classes, words), lengths), target


def inputs(config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """Return (words, lengths), of shapes (batch, words) and (batch,), both int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, classes) and labels (N,)."""
    return F.cross_entropy(output, target)

"""A bidirectional LSTM that classifies sentences of unequal length.

A. Graves, J. Schmidhuber. Framewise phoneme classification with bidirectional LSTM and other neural network
architectures. 2005, Neural Networks 18(5).
P. Zhou, Z. Qi, S. Zheng, J. Xu, H. Bao, B. Xu. Text Classification Improved by Integrating Bidirectional LSTM
with Two-dimensional Max Pooling. 2016, arXiv:1611.06639.

    scores = W [forward state after the last word, backward state after the first word] + b

Shown: a packed batch, in which each sentence ends, and its backward direction starts, at its own length.

N sentences, T words at most, H hidden units of one direction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from .sentences import beyond, ragged


@dataclass(frozen=True)
class Config:
    """Sizes of the classifier."""

    vocabulary: int
    embedded: int
    hidden: int
    classes: int
    batch: int
    words: int


# Widths of Zhou et al.
REAL = Config(vocabulary=10_000, embedded=300, hidden=300, classes=5, batch=32, words=64)
TINY = Config(vocabulary=24, embedded=12, hidden=12, classes=4, batch=16, words=9)


class Classifier(nn.Module):
    """Word embedding, bidirectional LSTM, a linear classifier of its two last states."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.embedded)
        self.lstm = nn.LSTM(config.embedded, config.hidden, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(2 * config.hidden, config.classes)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Map words (N, T) int64 and lengths (N,) int64 to scores (N, classes)."""
        # Packing reads the lengths on the host.
        packed = pack_padded_sequence(
            self.embedding(words), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, (hidden, _) = self.lstm(packed)  # (2, N, H)
        return self.classifier(torch.cat([hidden[0], hidden[1]], 1))


def build(config: Config) -> nn.Module:
    """Return a classifier with torch's default initialisation."""
    return Classifier(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return ((words, lengths), labels): name the one key word, wherever in the sentence it stands.

    Words below `classes` are key words, and the padding is full of them.
    """
    generator = torch.Generator().manual_seed(seed)
    words, lengths = ragged(config.batch, config.words, config.vocabulary - config.classes, generator)
    words += config.classes
    target = torch.randint(config.classes, (config.batch,), generator=generator)
    place = (torch.rand(config.batch, generator=generator) * lengths).long()
    words[torch.arange(config.batch), place] = target
    padding = beyond(lengths, config.words)
    return (torch.where(padding, words % config.classes, words), lengths), target


def inputs(config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """Return (words, lengths), of shapes (batch, words) and (batch,), both int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, classes) and labels (N,)."""
    return F.cross_entropy(output, target)

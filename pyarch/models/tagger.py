"""A stack of bidirectional LSTM layers that tags every word of a sentence.

Z. Huang, W. Xu, K. Yu. Bidirectional LSTM-CRF Models for Sequence Tagging. 2015, arXiv:1508.01991.
N. Reimers, I. Gurevych. Optimal Hyperparameters for Deep LSTM-Networks for Sequence Labeling Tasks. 2017,
arXiv:1707.06799.

    scores_t = W [forward_t, backward_t] + b        of the last layer; each layer reads both

Shown: a packed batch through a stacked bidirectional layer, unpacked again to a padded one. The conditional
random field that may follow has no recurrent layer and is left out.

N sentences, T words at most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .sentences import beyond, ragged

IGNORED = -100  # the target that torch's cross entropy leaves out


@dataclass(frozen=True)
class Config:
    """Sizes of the tagger; words are of `kinds`, and there are kinds x kinds tags."""

    vocabulary: int
    embedded: int
    hidden: int
    layers: int
    kinds: int
    batch: int
    words: int


# The depth and width that Reimers and Gurevych recommend, and nine tags, as for named entities.
REAL = Config(vocabulary=10_000, embedded=300, hidden=100, layers=2, kinds=3, batch=32, words=50)
TINY = Config(vocabulary=8, embedded=12, hidden=12, layers=2, kinds=2, batch=16, words=9)


class Tagger(nn.Module):
    """Word embedding, bidirectional LSTM layers, a linear classifier of every word."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.embedded)
        self.lstm = nn.LSTM(
            config.embedded, config.hidden, config.layers, batch_first=True, bidirectional=True
        )
        self.classifier = nn.Linear(2 * config.hidden, config.kinds**2)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Map words (N, T) int64 and lengths (N,) int64 to scores (N, T, tags), meaningless past an end."""
        # Packing reads the lengths on the host.
        packed = pack_padded_sequence(
            self.embedding(words), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=words.shape[1])
        return self.classifier(hidden)


def build(config: Config) -> nn.Module:
    """Return a tagger with torch's default initialisation."""
    return Tagger(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return ((words, lengths), tags): name the kinds of the words before and after each word.

    The kind of word w is w modulo `kinds`; outside of the sentence everything is of kind 0. Tags past the end
    are IGNORED.
    """
    generator = torch.Generator().manual_seed(seed)
    words, lengths = ragged(config.batch, config.words, config.vocabulary, generator)
    padding = beyond(lengths, config.words)
    kind = (words % config.kinds).masked_fill(padding, 0)
    before, after = F.pad(kind[:, :-1], (1, 0)), F.pad(kind[:, 1:], (0, 1))
    return (words, lengths), (config.kinds * before + after).masked_fill(padding, IGNORED)


def inputs(config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """Return (words, lengths), of shapes (batch, words) and (batch,), both int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, T, tags) and tags (N, T), IGNORED ones left out."""
    return F.cross_entropy(output.transpose(1, 2), target, ignore_index=IGNORED)

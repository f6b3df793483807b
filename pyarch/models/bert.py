"""BERT: an encoder that sees both sides of a word which it has to guess.

J. Devlin, M.-W. Chang, K. Lee, K. Toutanova. BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding. 2018, arXiv:1810.04805.

    x_t    = norm(E word_t + S segment_t + P_t)
    layer  = norm(y + ffn(y)),   y = norm(x + attention(x))
    scores = E norm(gelu(M x_t + m)) + b                          the embedding itself predicts

Shown: nn.TransformerEncoderLayer under a padding mask, trained as a masked language model. Two segments make
one text, FIRST a_1 .. a_m BORDER b_1 .. b_n BORDER, of whose words some are hidden behind MASK.

N texts, T words at most, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .search import IGNORED
from .sentences import beyond

# The first entries of the vocabulary are no words.
FIRST, BORDER, MASK, WORDS = 0, 1, 2, 3
SEGMENTS = 2

# The share of words to guess, and of them the shares that are hidden and that are replaced: the rest stays.
GUESSED, HIDDEN, REPLACED = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class Config:
    """Sizes of the model; `positions` is the number of words of the longest text."""

    vocabulary: int
    width: int
    heads: int
    hidden: int
    layers: int
    dropout: float
    positions: int
    batch: int
    words: int


# Widths of the base model, 2 of its 12 layers, a vocabulary of 8000 subwords in place of its 30,522.
REAL = Config(
    vocabulary=8000,
    width=768,
    heads=12,
    hidden=3072,
    layers=2,
    dropout=0.1,
    positions=512,
    batch=2,
    words=128,
)
TINY = Config(
    vocabulary=11,
    width=32,
    heads=4,
    hidden=64,
    layers=2,
    dropout=0.0,
    positions=16,
    batch=32,
    words=16,
)

SPREAD = 0.55  # deviation of the first weights times the root of the width: 0.02 in the base model
EPSILON = 1e-12  # of every normalisation


class Embedding(nn.Module):
    """The sum of what a word is, in which segment it stands, and at which place."""

    def __init__(self, config: Config):
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.segments = nn.Embedding(SEGMENTS, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.norm = nn.LayerNorm(config.width, EPSILON)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, words: Tensor, segments: Tensor) -> Tensor:
        place = torch.arange(words.shape[1], device=words.device)
        return self.dropout(self.norm(self.words(words) + self.segments(segments) + self.positions(place)))


class BERT(nn.Module):
    """Embedding, encoder layers, the prediction of every word."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = Embedding(config)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            config.hidden,
            config.dropout,
            activation="gelu",
            layer_norm_eps=EPSILON,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, config.layers)
        self.transform = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), nn.LayerNorm(config.width, EPSILON)
        )
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))
        self._initialise()

    def forward(self, words: Tensor, segments: Tensor, lengths: Tensor) -> Tensor:
        """Score every word of texts, those that can be read and those that are hidden.

        Args:
            words: (N, T) int64.
            segments: (N, T) int64, 0 or 1.
            lengths: (N,) int64, words of each text.

        Returns:
            (N, T, vocabulary).
        """
        x = self.embedding(words, segments)
        x = self.encoder(x, src_key_padding_mask=beyond(lengths, words.shape[1]))
        return F.linear(self.transform(x), self.embedding.words.weight, self.bias)

    def _initialise(self) -> None:
        """Draw the weights as the paper: normal, and no bias."""
        width = self.embedding.words.embedding_dim
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=SPREAD * width**-0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def build(config: Config) -> nn.Module:
    """Return a BERT with its initialisation."""
    return BERT(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return ((words, segments, lengths), target): guess words of texts whose segments repeat one word each.

    The padding is full of other words. Targets of words that are not to guess are IGNORED.
    """
    generator = torch.Generator().manual_seed(seed)
    N, T = config.batch, config.words

    def integers(low: int | Tensor, high: int | Tensor) -> Tensor:
        return low + (torch.rand(N, generator=generator) * (high - low)).long()

    # The border behind each segment, of one word at least.
    end = integers(T // 2, T)
    border = integers(2, end - 1)
    place = torch.arange(T)
    segments = (place > border.unsqueeze(1)).long()
    subjects = torch.randint(WORDS, config.vocabulary, (N, SEGMENTS), generator=generator)
    text = subjects.gather(1, segments)
    text[:, 0] = FIRST
    text[place == border.unsqueeze(1)] = BORDER
    text[place == end.unsqueeze(1)] = BORDER
    lengths = end + 1

    other = torch.randint(WORDS, config.vocabulary, (N, T), generator=generator)
    drawn, way = torch.rand(2, N, T, generator=generator)
    guessed = (drawn < GUESSED) & (text >= WORDS) & ~beyond(lengths, T)
    words = torch.where(guessed & (way < HIDDEN), MASK, text)
    replaced = guessed & (way >= HIDDEN) & (way < HIDDEN + REPLACED)
    words = torch.where(replaced | beyond(lengths, T), other, words)
    return (words, segments, lengths), text.masked_fill(~guessed, IGNORED)


def inputs(config: Config, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (words, segments, lengths), of shapes (batch, words), (batch, words), (batch,), all int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, T, vocabulary) and target (N, T), IGNORED words left out."""
    return F.cross_entropy(output.transpose(1, 2), target, ignore_index=IGNORED)

"""The Transformer: an encoder that reads a sentence, and a decoder that writes its translation.

A. Vaswani, N. Shazeer, N. Parmar, J. Uszkoreit, L. Jones, A. N. Gomez, L. Kaiser, I. Polosukhin. Attention Is
All You Need. 2017, arXiv:1706.03762.
C. Szegedy, V. Vanhoucke, S. Ioffe, J. Shlens, Z. Wojna. Rethinking the Inception Architecture for Computer
Vision. 2015, arXiv:1512.00567 (label smoothing).

    x_s     = sqrt(W) E word_s + position_s
    encoder = norm(y + ffn(y)),    y = norm(x + attention(x))
    decoder = norm(z + ffn(z)),    z = norm(y + attention(y, encoded)),    y = norm(x + causal attention(x))
    scores  = E decoded                       one embedding for source, target and prediction

Shown: nn.Transformer, whose encoder and memory are under a padding mask, and whose decoder is told that its
mask is causal. It puts one more normalisation behind the last layer of each half than the paper does, and has
GELU here where the paper has ReLU.

N sentences, S source words at most, T target words, W width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import search
from .encoder import SinusoidalPositions
from .search import BEGIN, END, IGNORED, WORDS, Translation
from .sentences import beyond, ragged


@dataclass(frozen=True)
class Config:
    """Sizes of the model; source and target share the vocabulary. `layers` is the number in each half."""

    vocabulary: int
    width: int
    heads: int
    hidden: int
    layers: int
    dropout: float
    batch: int
    words: int


# The base model, 2 + 2 of its 6 + 6 layers, a vocabulary of 8000 subwords in place of its 37,000.
REAL = Config(vocabulary=8000, width=512, heads=8, hidden=2048, layers=2, dropout=0.1, batch=4, words=63)
TINY = Config(vocabulary=8, width=32, heads=4, hidden=64, layers=1, dropout=0.0, batch=16, words=4)


class Transformer(nn.Module):
    """Encoder and decoder; trained on given words, read by greedy or beam search."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = SinusoidalPositions(config.words + 1, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = nn.Transformer(
            config.width,
            config.heads,
            config.layers,
            config.layers,
            config.hidden,
            config.dropout,
            activation="gelu",
            batch_first=True,
        )
        # With the root of the width in front of it, of the size of the positions.
        nn.init.normal_(self.embedding.weight, std=config.width**-0.5)

    def embed(self, words: Tensor) -> Tensor:
        """Map words (N, T) to embeddings with positions (N, T, W)."""
        scale = math.sqrt(self.embedding.embedding_dim)
        return self.dropout(scale * self.embedding(words) + self.positions(words.shape[1]))

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Read the source (N, S); returns the encoded words (N, S, W) and the mask (N, S) of padding."""
        padding = beyond(lengths, source.shape[1])
        return self.transformer.encoder(self.embed(source), src_key_padding_mask=padding), padding

    def decode(self, previous: Tensor, encoded: Tensor, padding: Tensor) -> Tensor:
        """Map the words so far (N, T) to features (N, T, W), each of which predicts the next word."""
        T = previous.shape[1]
        blocked = torch.ones(T, T, dtype=torch.bool, device=previous.device).triu(1)
        return self.transformer.decoder(
            self.embed(previous),
            encoded,
            tgt_mask=blocked,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )

    def score(self, features: Tensor) -> Tensor:
        """Map features (..., W) to scores (..., vocabulary)."""
        return F.linear(features, self.embedding.weight)

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
        """Score the words of a translation of which the previous word is given (teacher forcing).

        Args:
            source: (N, S) int64.
            lengths: (N,) int64, words of each source sentence.
            previous: (N, T) int64, BEGIN and the translation without its last word.

        Returns:
            (N, T, vocabulary).
        """
        return self.score(self.decode(previous, *self.encode(source, lengths)))

    @torch.no_grad()
    def greedy(self, source: Tensor, lengths: Tensor, limit: int) -> Translation:
        """Translate by the likeliest word each time, at most `limit` words with END."""
        encoded, padding = self.encode(source, lengths)
        return search.greedy(self._next(encoded, padding), _no_words(source), limit)

    @torch.no_grad()
    def beam_search(self, source: Tensor, lengths: Tensor, beam: int, limit: int) -> Translation:
        """Translate by keeping the `beam` likeliest beginnings, at most `limit` words with END."""
        encoded, padding = (each.repeat_interleave(beam, 0) for each in self.encode(source, lengths))
        return search.beam_search(self._next(encoded, padding), _no_words(source), beam, limit)

    def _next(self, encoded: Tensor, padding: Tensor) -> search.Step:
        """The step of a search: what it remembers are the words so far, all of which are read again."""

        def step(word: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
            words = torch.cat([words, word.unsqueeze(1)], 1)
            return self.score(self.decode(words, encoded, padding)[:, -1]), words

        return step


def _no_words(source: Tensor) -> Tensor:
    return source.new_empty(len(source), 0)


def build(config: Config) -> nn.Module:
    """Return a model with torch's default initialisation of nn.Transformer."""
    return Transformer(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return ((source, lengths, previous), target): the same sentence in another language, then END.

    That language puts the word v + 1 in place of v, and each two neighbours in the other order. Targets past
    END are IGNORED.
    """
    generator = torch.Generator().manual_seed(seed)
    words = config.vocabulary - WORDS
    source, lengths = ragged(config.batch, config.words, words, generator)
    place = torch.arange(config.words + 1)
    neighbour = torch.minimum(place ^ 1, lengths.unsqueeze(1) - 1).clamp(max=config.words - 1)
    target = WORDS + (source.gather(1, neighbour) + 1) % words
    target = target.masked_fill(place == lengths.unsqueeze(1), END)
    previous = F.pad(target[:, :-1], (1, 0), value=BEGIN)
    return (WORDS + source, lengths, previous), target.masked_fill(place > lengths.unsqueeze(1), IGNORED)


def inputs(config: Config, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (source, lengths, previous), of shapes (batch, words), (batch,), (batch, words + 1), int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Return the cross entropy of scores (N, T, vocabulary) and target (N, T), IGNORED words left out.

    Args:
        output, target: as said.
        smoothing: the share of each target that is spread over all words; the paper has 0.1.
    """
    return F.cross_entropy(output.transpose(1, 2), target, ignore_index=IGNORED, label_smoothing=smoothing)

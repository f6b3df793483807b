"""T5: text to text, with attention that knows the distance between two words and not their places.

C. Raffel, N. Shazeer, A. Roberts, K. Lee, S. Narang, M. Matena, Y. Zhou, W. Li, P. J. Liu. Exploring the
Limits of Transfer Learning with a Unified Text-to-Text Transformer. 2019, arXiv:1910.10683.
B. Zhang, R. Sennrich. Root Mean Square Layer Normalization. 2019, arXiv:1910.07467.
N. Shazeer. GLU Variants Improve Transformer. 2020, arXiv:2002.05202 (the gated feed-forward of T5 1.1).

    x           = x + branch(norm(x)),   branch = attention, attention to the encoded words, feed-forward
    weights_ij  = softmax_j(q_i . k_j + bias[bucket(j - i)])          no scaling; a bias for each head
    bucket(d)   = |d|                                                 where |d| is below half of the buckets,
                  beyond, as many buckets again of equal width in log |d|, the last one for all that is far;
                  where both sides are seen, half of the buckets are for d > 0
    feed        = W_o relu(W_i x)     or, gated,     W_o (gelu(W_g x) * W_i x)
    scores      = E norm(x) / sqrt(W)                                 the embedding itself predicts

Shown: F.scaled_dot_product_attention, called by the model itself under a float mask that learns. One table of
biases serves all layers of the encoder, another one all layers of the decoder.

N texts, S source words at most, T target words, H heads, W width, D features of a head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .search import BEGIN, END
from .sentences import beyond, ragged

# The first entries of the vocabulary are no words.
GAP, WORDS = 2, 3


@dataclass(frozen=True)
class Config:
    """Sizes of the model; `layers` is the number in each half, `features` that of each head.

    The task is to write the words that are `missing` in a text.
    """

    vocabulary: int
    width: int
    heads: int
    features: int
    hidden: int
    layers: int
    gated: bool
    dropout: float
    missing: int
    batch: int
    words: int
    buckets: int = 32
    farthest: int = 128


# The small model of T5 1.1, 2 + 2 of its 8 + 8 layers, a vocabulary of 8000 subwords in place of its 32,128.
REAL = Config(
    vocabulary=8000,
    width=512,
    heads=6,
    features=64,
    hidden=1024,
    layers=2,
    gated=True,
    dropout=0.1,
    missing=64,
    batch=2,
    words=256,
)
TINY = Config(
    vocabulary=11,
    width=32,
    heads=4,
    features=8,
    hidden=64,
    layers=1,
    gated=True,
    dropout=0.0,
    missing=2,
    batch=16,
    words=12,
    buckets=8,
    farthest=16,
)

EPSILON = 1e-6  # of every normalisation


def bucket(distance: Tensor, buckets: int, farthest: int, both_sides: bool) -> Tensor:
    """Return the bucket of each distance from query to key, key - query.

    Args:
        distance: int64 of any shape; without `both_sides` a positive one counts as 0.
        buckets: how many there are.
        farthest: the distance from which on all are in the last bucket of their side.
        both_sides: whether keys behind the query have buckets of their own.
    """
    side = torch.zeros_like(distance)
    if both_sides:
        buckets //= 2
        side = torch.where(distance > 0, buckets, 0)
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = buckets // 2
    # In single precision and in this order, for the buckets of published weights.
    octaves = torch.log(distance.clamp(min=exact).float() / exact) / math.log(farthest / exact)
    far = exact + (octaves * (buckets - exact)).long()
    return side + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


class RelativeBias(nn.Module):
    """One number for each bucket of distances and each head."""

    def __init__(self, config: Config, both_sides: bool):
        super().__init__()
        self.table = nn.Embedding(config.buckets, config.heads)
        self.farthest = config.farthest
        self.both_sides = both_sides

    def forward(self, T: int) -> Tensor:
        """Return what is added to the scores of T words, (1, H, T, T)."""
        place = torch.arange(T, device=self.table.weight.device)
        distance = place - place.unsqueeze(1)
        chosen = bucket(distance, self.table.num_embeddings, self.farthest, self.both_sides)
        return self.table(chosen).permute(2, 0, 1).unsqueeze(0)


class Attention(nn.Module):
    """Attention without biases in its projections and without scaling of its scores."""

    def __init__(self, config: Config):
        super().__init__()
        inner = config.heads * config.features
        self.heads = config.heads
        self.dropout = config.dropout
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.value = nn.Linear(config.width, inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Let x (N, T, W) look at memory (N, S, W) under a mask that fits (N, H, T, S)."""
        q, k, v = (
            project(each).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, H, T or S, D)
            for project, each in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=1.0)
        return self.out(seen.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with ReLU between them, or, gated, with a second first layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False) if config.gated else None
        self.first = nn.Linear(config.width, config.hidden, bias=False)
        self.activation = nn.GELU("tanh") if config.gated else nn.ReLU()
        self.dropout = nn.Dropout(config.dropout)
        self.last = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        return self.last(self.dropout(hidden))


class Layer(nn.Module):
    """Attention to itself, in a decoder attention to the encoded words, and feed-forward."""

    def __init__(self, config: Config, is_decoder: bool):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, EPSILON)
        self.attention = Attention(config)
        if is_decoder:
            self.memory_norm = nn.RMSNorm(config.width, EPSILON)
            self.memory_attention = Attention(config)
        self.feed_norm = nn.RMSNorm(config.width, EPSILON)
        self.feed = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, normed, mask))
        if memory is not None:
            x = x + self.dropout(self.memory_attention(self.memory_norm(x), memory, memory_mask))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class T5(nn.Module):
    """Encoder and decoder that share an embedding, which predicts too."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder_bias = RelativeBias(config, both_sides=True)
        self.encoder = nn.ModuleList(Layer(config, is_decoder=False) for _ in range(config.layers))
        self.encoder_norm = nn.RMSNorm(config.width, EPSILON)
        self.decoder_bias = RelativeBias(config, both_sides=False)
        self.decoder = nn.ModuleList(Layer(config, is_decoder=True) for _ in range(config.layers))
        self.decoder_norm = nn.RMSNorm(config.width, EPSILON)
        self._initialise()

    def forward(self, source: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
        """Score the missing words, of which the previous word is given (teacher forcing).

        Args:
            source: (N, S) int64.
            lengths: (N,) int64, words of each source text.
            previous: (N, T) int64, BEGIN and the missing words.

        Returns:
            (N, T, vocabulary).
        """
        S, T = source.shape[1], previous.shape[1]
        padding = beyond(lengths, S)[:, None, None]  # (N, 1, 1, S)
        mask = self.encoder_bias(S).masked_fill(padding, -torch.inf)  # (N, H, S, S)
        encoded = self.dropout(self.embedding(source))
        for layer in self.encoder:
            encoded = layer(encoded, mask)
        encoded = self.dropout(self.encoder_norm(encoded))

        later = torch.ones(T, T, dtype=torch.bool, device=source.device).triu(1)
        mask = self.decoder_bias(T).masked_fill(later, -torch.inf)  # (1, H, T, T)
        x = self.dropout(self.embedding(previous))
        for layer in self.decoder:
            x = layer(x, mask, encoded, ~padding)
        x = self.dropout(self.decoder_norm(x))
        return F.linear(x * x.shape[2] ** -0.5, self.embedding.weight)

    def _initialise(self) -> None:
        """Draw the weights as T5: for outputs of order one, and, without scaling, scores of order one."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, RelativeBias):
                nn.init.normal_(module.table.weight, std=self.embedding.embedding_dim**-0.5)
        for module in self.modules():
            if isinstance(module, Attention):
                features = module.query.out_features // module.heads
                nn.init.normal_(module.query.weight, std=(module.query.in_features * features) ** -0.5)


def build(config: Config) -> nn.Module:
    """Return a T5 with its initialisation."""
    return T5(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return ((source, lengths, previous), target): write the words that are missing in a text, then END.

    Each text counts on from a random word, and begins again after the last of the vocabulary. One GAP stands
    for all the words that are missing. The padding is full of gaps and words.
    """
    generator = torch.Generator().manual_seed(seed)
    source, lengths = ragged(config.batch, config.words, config.vocabulary - GAP, generator)
    begin = torch.randint(config.vocabulary - WORDS, (config.batch, 1), generator=generator)
    # A word at least on each side of the gap.
    gap = 1 + (torch.rand(config.batch, 1, generator=generator) * (lengths.unsqueeze(1) - 2)).long()
    place = torch.arange(config.words)
    place = torch.where(place > gap, place + config.missing - 1, place)
    missing = gap + torch.arange(config.missing)
    text, target = (WORDS + (begin + each) % (config.vocabulary - WORDS) for each in (place, missing))
    text = text.scatter(1, gap, GAP)
    source = torch.where(beyond(lengths, config.words), GAP + source, text)
    target = F.pad(target, (0, 1), value=END)
    previous = F.pad(target[:, :-1], (1, 0), value=BEGIN)
    return (source, lengths, previous), target


def inputs(config: Config, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (source, lengths, previous), of shapes (batch, words), (batch,), (batch, missing + 1), int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, T, vocabulary) and target (N, T)."""
    return F.cross_entropy(output.transpose(1, 2), target)

"""R-Transformer: a small recurrence over the words just before each word, then causal attention over all.

Z. Wang, Y. Ma, Z. Liu, J. Tang. R-Transformer: Recurrent Neural Network Enhanced Transformer. 2019,
arXiv:1907.05572.

    a_t    = x_t + gru(norm(x)_(t-M+1) .. norm(x)_t)      its last state; zeros before the first word
    layer  = b + ffn(norm(b)),   b = a + attention(norm(a))
    scores = C x_t + c

Shown: a recurrence of M steps over a batch of N T windows, in front of nn.TransformerEncoderLayer under a
causal mask. The recurrence tells the order, so that there are no positions. Normalisation comes first, as in
the authors' code.

N sentences, T words, M words of a window, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes of the model; words are of `kinds`, and there are kinds x kinds tags."""

    vocabulary: int
    width: int
    heads: int
    layers: int
    window: int
    dropout: float
    kinds: int
    batch: int
    words: int


# The authors' model of characters of the Penn Treebank, 2 of its 3 layers, half of its 400 characters, one of
# its 16 sentences.
REAL = Config(
    vocabulary=49, width=512, heads=8, layers=2, window=7, dropout=0.15, kinds=3, batch=1, words=200
)
TINY = Config(vocabulary=6, width=24, heads=4, layers=2, window=3, dropout=0.0, kinds=2, batch=16, words=12)


class LocalGRU(nn.Module):
    """The state of a GRU after each window of words, every window from a state of zeros."""

    def __init__(self, width: int, window: int):
        super().__init__()
        self.window = window
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, T, W) to states (N, T, W)."""
        padded = F.pad(x, (0, 0, self.window - 1, 0))
        windows = padded.unfold(1, self.window, 1).transpose(2, 3)  # (N, T, M, W)
        _, state = self.gru(windows.flatten(0, 1))
        return state[0].unflatten(0, x.shape[:2])


class Layer(nn.Module):
    """A local recurrence on a residual branch, then an encoder layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.local = LocalGRU(config.width, config.window)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, config.dropout, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self.local(self.norm(x)))
        return self.transformer(x, src_mask=mask, is_causal=True)


class RTransformer(nn.Module):
    """Word embedding, the layers, a linear classifier of every word."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.classifier = nn.Linear(config.width, config.kinds**2)

    def forward(self, words: Tensor) -> Tensor:
        """Map words (N, T) int64 to scores (N, T, tags) of each, which depend on no later word."""
        x = self.dropout(self.embedding(words))
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1], device=x.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return self.classifier(x)


def build(config: Config) -> nn.Module:
    """Return an R-Transformer with torch's default initialisation."""
    return RTransformer(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((words,), tags): name the kinds of the sentence's first word and of the word before each.

    The kind of word w is w modulo `kinds`; before the first word stands kind 0. The word before is within
    the recurrence's window, the first word soon only within the attention's reach.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(config.vocabulary, (config.batch, config.words), generator=generator)
    kind = words % config.kinds
    return (words,), config.kinds * kind[:, :1] + F.pad(kind[:, :-1], (1, 0))


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (words,), of shape (batch, words) int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, T, tags) and tags (N, T)."""
    return F.cross_entropy(output.transpose(1, 2), target)

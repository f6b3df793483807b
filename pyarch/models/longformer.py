"""Longformer: each word sees its neighbours, and a few global words see and are seen by all.

I. Beltagy, M. E. Peters, A. Cohan. Longformer: The Long-Document Transformer. 2020, arXiv:2004.05150.

    word i sees word j    where |i - j| <= window, or i or j is one of the first `global_tokens` words
    layer = norm(y + ffn(y)),   y = norm(x + attention(x))

Shown: one pattern, written in two ways. Plain torch has no word for it, and is given a mask (T, T). A layer
that knows the pattern needs no mask: `patterns` says which layers follow which one, and `Config.masked =
False` leaves the masks out of the same model. Only there is the cost linear in T.

The paper projects the global words by matrices of their own, which start as copies of the others; here they
share them.

N documents, T words.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes of the model.

    `window` counts the words seen on each side; words are of `kinds`, and there are kinds x kinds tags.
    Without `masked` the model computes dense attention, unless its layers know the pattern by themselves.
    """

    vocabulary: int
    width: int
    heads: int
    layers: int
    window: int
    global_tokens: int
    kinds: int
    batch: int
    words: int
    masked: bool = True


# The window and the heads of 64 features of the base model, a third of its width, 2 of its 12 layers, half of
# its 4096 words.
REAL = Config(
    vocabulary=10_000,
    width=256,
    heads=4,
    layers=2,
    window=256,
    global_tokens=1,
    kinds=3,
    batch=1,
    words=2048,
)
TINY = Config(
    vocabulary=6, width=32, heads=4, layers=2, window=2, global_tokens=1, kinds=2, batch=16, words=24
)


def blocked_pairs(T: int, window: int, global_tokens: int) -> Tensor:
    """Return a mask (T, T) that is true where word i (row) does not see word j (column)."""
    place = torch.arange(T)
    far = (place.unsqueeze(1) - place).abs() > window
    local = place >= global_tokens
    return far & local & local.unsqueeze(1)


class Layer(nn.Module):
    """Attention and feed-forward, each on a residual branch with normalisation after it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, blocked: Tensor | None) -> Tensor:
        attended, _ = self.attention(x, x, x, attn_mask=blocked, need_weights=False)
        x = self.attention_norm(x + attended)
        return self.norm(x + self.feed_forward(x))


class Longformer(nn.Module):
    """Word and position embeddings, the layers, a linear classifier of every word."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.words, config.width)
        self.layers = nn.ModuleList(Layer(config.width, config.heads) for _ in range(config.layers))
        self.classifier = nn.Linear(config.width, config.kinds**2)
        pairs = (config.words, config.window, config.global_tokens)
        self.register_buffer("blocked", blocked_pairs(*pairs) if config.masked else None, persistent=False)

    def forward(self, words: Tensor) -> Tensor:
        """Map words (N, T) int64 to scores (N, T, tags)."""
        T = words.shape[1]
        blocked = None if self.blocked is None else self.blocked[:T, :T]
        x = self.embedding(words) + self.positions(torch.arange(T, device=words.device))
        for layer in self.layers:
            x = layer(x, blocked)
        return self.classifier(x)


def build(config: Config) -> nn.Module:
    """Return a Longformer with torch's default initialisation; `masked` changes no parameter."""
    return Longformer(config)


def patterns(config: Config) -> dict[str, dict[str, int]]:
    """Return what each layer's mask says: a pattern over layer names -> the window and the global tokens."""
    return {"layers.*.attention": {"window": config.window, "global_tokens": config.global_tokens}}


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((words,), tags): name the kinds of the document's first word and of the word before each.

    The kind of word w is w modulo `kinds`. The first word is seen from afar only while it is global.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(config.vocabulary, (config.batch, config.words), generator=generator)
    kind = words % config.kinds
    return (words,), config.kinds * kind[:, :1] + kind.roll(1, dims=1)


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (words,), of shape (batch, words) int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, T, tags) and tags (N, T)."""
    return F.cross_entropy(output.transpose(1, 2), target)

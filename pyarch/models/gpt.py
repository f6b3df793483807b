"""GPT: Transformer layers that look back only, and predict the next token.

A. Radford, K. Narasimhan, T. Salimans, I. Sutskever. Improving Language Understanding by Generative
Pre-Training. 2018, OpenAI.
A. Radford, J. Wu, R. Child, D. Luan, D. Amodei, I. Sutskever. Language Models are Unsupervised Multitask
Learners. 2019, OpenAI (GPT-2: normalisation first, scaled residual projections).

    x_t    = E token_t + P_t
    layer  = y + ffn(norm(y)),   y = x + attention(norm(x))
    scores = E norm(x)                                          the embedding itself predicts

Shown: nn.TransformerEncoderLayer with normalisation first, under a causal mask that it is told to be causal.

N sequences, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes of a GPT; `delay` is the distance of the task."""

    vocabulary: int
    width: int
    heads: int
    layers: int
    dropout: float
    delay: int
    batch: int
    tokens: int


# Widths of GPT-2 small, 2 of its 12 layers, a vocabulary of bytes, half of its 1024 tokens.
REAL = Config(vocabulary=256, width=768, heads=12, layers=2, dropout=0.1, delay=4, batch=1, tokens=512)
TINY = Config(vocabulary=8, width=32, heads=4, layers=2, dropout=0.0, delay=4, batch=8, tokens=33)

SPREAD = 0.55  # deviation of the first weights times the root of the width: 0.02 at the width of GPT-2


class GPT(nn.Module):
    """Token and position embeddings, causal layers, the prediction of every next token."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.tokens, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width,
                config.heads,
                4 * config.width,
                config.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self._initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T) int64 to scores (N, T, vocabulary) of each next one."""
        T = tokens.shape[1]
        place = torch.arange(T, device=tokens.device)
        x = self.dropout(self.embedding(tokens) + self.positions(place))
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=x.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return F.linear(self.norm(x), self.embedding.weight)

    def _initialise(self) -> None:
        """Draw the weights as GPT-2: normal, those that end in the residual stream smaller with the depth."""
        spread = SPREAD * self.embedding.embedding_dim**-0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                ends_a_branch = name.endswith(("out_proj.weight", "linear2.weight"))
                depth = 2 * len(self.layers) if ends_a_branch else 1
                nn.init.normal_(parameter, std=spread / depth**0.5)


def build(config: Config) -> nn.Module:
    """Return a GPT with GPT-2's initialisation."""
    return GPT(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((tokens,), next tokens): random ones, repeated from `delay` tokens before.

    The next tokens of the first `delay` - 1, which nobody can know, are -100: the value that torch's cross
    entropy ignores.
    """
    generator = torch.Generator().manual_seed(seed)
    motif = torch.randint(config.vocabulary, (config.batch, config.delay), generator=generator)
    tokens = motif.repeat(1, config.tokens // config.delay + 1)[:, : config.tokens + 1]
    target = tokens[:, 1:].clone()
    target[:, : config.delay - 1] = -100
    return (tokens[:, :-1],), target


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (tokens,), of shape (batch, tokens) int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, T, vocabulary) and next tokens (N, T)."""
    return F.cross_entropy(output.transpose(1, 2), target)

"""Mamba-2: a gated state-space model behind a short causal depthwise convolution.

A. Gu, T. Dao. Mamba: Linear-Time Sequence Modeling with Selective State Spaces. 2023, arXiv:2312.00752.
T. Dao, A. Gu. Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality. 2024, arXiv:2405.21060.

    z, u, dt   = in_proj(x)
    v, B, C    = silu(causal depthwise convolution of 4 taps over u)
    state_t    = exp(dt_t a) state_(t-1) + dt_t B_t v_t            one decay a < 0 for each head
    out        = out_proj(rmsnorm((C_t . state_t + D v_t) silu(z)))

Shown: a causal convolution of 4 taps on a transposed view, called as a module (many implementations hand its
weight to a kernel of their own, and never call it). The recurrence is evaluated in its dual form, one masked
matrix product that is quadratic in T: brief to write, and cheap for the short sequences shown here.

N sequences, T tokens, H heads of P channels, S states, E = H P inner channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    """Sizes of a Mamba-2; the inner width is twice `width`."""

    vocabulary: int
    width: int
    layers: int
    head: int
    states: int
    kernel: int
    batch: int
    tokens: int


# Widths of the published 130 million parameter model, 4 of its 24 layers, a vocabulary of bytes.
REAL = Config(vocabulary=256, width=768, layers=4, head=64, states=128, kernel=4, batch=2, tokens=256)
TINY = Config(vocabulary=8, width=16, layers=1, head=8, states=8, kernel=4, batch=4, tokens=33)


def selective_scan(values: Tensor, step: Tensor, decay: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """Run state_t = exp(step_t decay) state_(t-1) + step_t write_t values_t and return read_t . state_t.

    Args:
        values: (N, T, H, P).
        step: (N, T, H), positive.
        decay: (H,), negative.
        write: (N, T, S), the vector B_t of the paper, shared by the heads.
        read: (N, T, S), the vector C_t of the paper, shared by the heads.

    Returns:
        (N, T, H, P).
    """
    total = (step * decay).cumsum(1).transpose(1, 2)  # (N, H, T): log of the decay since the start
    since = total.unsqueeze(3) - total.unsqueeze(2)  # (N, H, T, T): from column to row
    future = torch.ones(since.shape[-2:], dtype=torch.bool, device=since.device).triu(1)
    kept = since.masked_fill(future, -math.inf).exp()
    mixing = kept * (read @ write.transpose(1, 2)).unsqueeze(1)
    return (mixing @ (values * step.unsqueeze(3)).transpose(1, 2)).transpose(1, 2)


class Mixer(nn.Module):
    """Convolve a few tokens, remember selectively, gate."""

    def __init__(self, config: Config):
        super().__init__()
        inner = 2 * config.width
        heads = inner // config.head
        convolved = inner + 2 * config.states
        self.sizes = (inner, convolved, heads)
        self.states = config.states
        self.head = config.head
        self.in_proj = nn.Linear(config.width, inner + convolved + heads, bias=False)
        self.conv1d = nn.Conv1d(
            convolved, convolved, config.kernel, padding=config.kernel - 1, groups=convolved
        )
        # Published ranges: steps from 1e-3 to 1e-1 after the softplus, decays from 1 to 16.
        step = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.log_decay = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        N, T, _ = x.shape
        gate, u, step = self.in_proj(x).split(self.sizes, dim=2)
        # Padded on both sides by torch's Conv1d: the first T outputs are the causal ones.
        u = F.silu(self.conv1d(u.transpose(1, 2))[:, :, :T].transpose(1, 2))
        values, write, read = u.split((self.sizes[0], self.states, self.states), dim=2)
        values = values.unflatten(2, (-1, self.head))  # (N, T, H, P)
        step = F.softplus(step + self.step_bias)
        y = selective_scan(values, step, -self.log_decay.exp(), write, read)
        y = (y + self.skip.unsqueeze(1) * values).flatten(2)
        return self.out_proj(self.norm(y * F.silu(gate)))


class Mamba(nn.Module):
    """Token embedding, residual mixers after RMS normalisation, a linear prediction of every token."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.mixers = nn.ModuleList(Mixer(config) for _ in range(config.layers))
        self.norms = nn.ModuleList(nn.RMSNorm(config.width, eps=1e-5) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.predict = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (N, T) int64 to scores (N, T, vocabulary)."""
        x = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.predict(self.norm(x))


def build(config: Config) -> nn.Module:
    """Return a Mamba-2 with the published ranges of steps and decays, and torch's default for the rest."""
    return Mamba(config)


def batch(config: Config, seed: int) -> tuple[tuple[Tensor], Tensor]:
    """Return ((tokens,), targets): repeat the token seen kernel - 1 places before.

    The first targets, which have no such token, are -100: the value that torch's cross entropy ignores.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocabulary, (config.batch, config.tokens), generator=generator)
    delay = config.kernel - 1
    return (tokens,), F.pad(tokens[:, : config.tokens - delay], (delay, 0), value=-100)


def inputs(config: Config, seed: int) -> tuple[Tensor]:
    """Return (tokens,), of shape (batch, tokens) int64."""
    return batch(config, seed)[0]


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of scores (N, T, vocabulary) and targets (N, T)."""
    return F.cross_entropy(output.transpose(1, 2), target)

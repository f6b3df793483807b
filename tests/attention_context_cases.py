"""Models that call torch's scaled_dot_product_attention themselves, for the tests of who answers them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, TOKENS = 24, 3, 13


class Attention(nn.Module):
    """Self-attention, written out."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:
        attended = F.scaled_dot_product_attention(*self.heads(x), is_causal=is_causal)
        return self.out(attended.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two of them, and a function between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor, *, is_causal: bool = True) -> Tensor:
        """Map (B, T, WIDTH) to the same."""
        return self.second(torch.relu(self.first(x, is_causal)) + x, is_causal)


class Mixed(nn.Module):
    """A plain call, and torch's layer whose call is out of sight."""

    def __init__(self):
        super().__init__()
        self.plain = Attention()
        self.layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x)
        return self.layer(x, x, x, need_weights=False)[0]


def tokens(batch: int = 2, count: int = TOKENS) -> Tensor:
    return torch.randn(batch, count, WIDTH)

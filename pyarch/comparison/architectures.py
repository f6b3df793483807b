"""The architectures that are compared, in plain torch.nn: each maps (B, T, W) to (B, T, W).

    recurrent     h[t] = cell(x[t], h[t - 1])
                  (RNN: Elman, 1990; LSTM: Hochreiter and Schmidhuber, 1997; GRU: Cho et al., 2014,
                  arXiv:1406.1078; both directions: Schuster and Paliwal, 1997)
    attention     y[t] = sum over s <= t (and s >= t - before) of softmax(q[t] k[s] / sqrt(D)) v[s]
                  (Vaswani et al., 2017, arXiv:1706.03762; windows: Beltagy et al., 2020, arXiv:2004.05150)
    convolution   y[t] = sum over i < k of w[i] x[t - i]; depthwise: each channel by itself; separable: a
                  depthwise one, then a product over channels (Chollet, 2017, arXiv:1610.02357)

Each says how many floating-point operations its products take, two for a multiplication with its addition.

Legend: B sequences, T tokens, W width, k taps.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyarch.comparison.question import Question
from pyarch.nn.config import Config
from pyarch.swap import swap

GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}


class Recurrent(nn.Module):
    """One recurrent layer; of two directions each has half of the width."""

    def __init__(self, kind: type[nn.RNNBase], width: int, directions: int = 1) -> None:
        super().__init__()
        if width % directions:
            raise ValueError(f"width {width} cannot be shared by {directions} directions")
        self.gates = GATES[kind]
        self.layer = kind(width, width // directions, batch_first=True, bidirectional=directions == 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]

    def flop(self, length: int) -> int:
        width, hidden = self.layer.input_size, self.layer.hidden_size
        directions = 2 if self.layer.bidirectional else 1
        return 2 * length * directions * self.gates * hidden * (width + hidden)


class CausalAttention(nn.Module):
    """Self-attention to the token itself and those before it: all, or the nearest `before` of them.

    torch is told so by a mask (T, T), which is made once a length, and of a triangle also by its hint. With
    `is_masked` off it is not told: what computes the layer must know.
    """

    def __init__(self, width: int, heads: int, before: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is no multiple of {heads} heads")
        self.before = before
        self.is_masked = True
        self.layer = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_masked:
            return self.layer(x, x, x, need_weights=False)[0]
        if self.mask is None or self.mask.shape[0] != x.shape[1]:
            self.mask = None
            self.mask = _hiding(x, self.before)
        is_triangle = self.before is None
        return self.layer(x, x, x, attn_mask=self.mask, is_causal=is_triangle, need_weights=False)[0]

    def mask_bytes(self, length: int, itemsize: int) -> int:
        """What the mask of a call takes."""
        return length * length * itemsize if self.is_masked else 0

    def flop(self, length: int) -> int:
        width = self.layer.embed_dim
        return 8 * length * width * width + 4 * width * self.pairs(length)

    def pairs(self, length: int) -> int:
        """How many queries see how many keys."""
        reach = length if self.before is None else min(self.before + 1, length)
        return length * reach - reach * (reach - 1) // 2


class CausalConvolution(nn.Module):
    """A convolution over the token itself and the k - 1 before it; `mixes`: then a product over channels."""

    def __init__(self, width: int, kernel: int, groups: int, mixes: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv1d(width, width, kernel, groups=groups)
        self.mix = nn.Linear(width, width) if mixes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        rows = F.pad(x.transpose(1, 2), (self.layer.kernel_size[0] - 1, 0))  # (B, W, T + k - 1)
        return self.mix(self.layer(rows).transpose(1, 2))

    def flop(self, length: int) -> int:
        weights = [each for each in self.parameters() if each.dim() > 1]
        return 2 * length * sum(each.numel() for each in weights)


def _hiding(x: Tensor, before: int | None) -> Tensor:
    """-inf where a token of x (B, T, W) does not see another, else 0: (T, T)."""
    length = x.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu_(1)
    if before is not None:
        hidden |= torch.ones_like(hidden).tril_(-before - 1)
    return torch.zeros(length, length, dtype=x.dtype, device=x.device).masked_fill_(hidden, -torch.inf)


@dataclass(frozen=True)
class Architecture:
    """One row of the comparison.

    Args:
        family: "recurrent", "attention" or "convolution".
        build: makes the module with torch's initial parameters; ValueError where it cannot be of that size.
        is_causal: whether a token sees none after it, so that sequences can be generated.
        note: what a reader must know.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    is_causal: bool = True
    note: str = ""


def architectures(question: Question) -> tuple[Architecture, ...]:
    """All that are compared, at the user's sizes."""
    width, kernel, window = question.width, question.kernel, question.window
    some_heads = question.heads[len(question.heads) // 2]
    taps, before = _counted(kernel, "tap"), _counted(window, "token")
    return (
        Architecture("vanilla RNN", "recurrent", partial(Recurrent, nn.RNN, width)),
        Architecture("GRU", "recurrent", partial(Recurrent, nn.GRU, width)),
        Architecture("LSTM", "recurrent", partial(Recurrent, nn.LSTM, width)),
        Architecture(
            "BiLSTM",
            "recurrent",
            partial(Recurrent, nn.LSTM, width, directions=2),
            is_causal=False,
            note="reads both ways, each with half of the width: not causal, it cannot generate",
        ),
        *(
            Architecture(
                f"attention ({_counted(heads, 'head')})", "attention", partial(CausalAttention, width, heads)
            )
            for heads in question.heads
        ),
        Architecture(
            f"windowed attention ({_counted(some_heads, 'head')})",
            "attention",
            partial(CausalAttention, width, some_heads, window),
            note=f"sees {before} before its own: torch by a mask, pyarch by a rule with that window",
        ),
        Architecture(
            "depthwise conv",
            "convolution",
            partial(CausalConvolution, width, kernel, width),
            note=f"{taps}; each channel by itself, so it needs a product over channels beside it",
        ),
        Architecture(
            "separable conv",
            "convolution",
            partial(CausalConvolution, width, kernel, width, mixes=True),
            note=f"depthwise with {taps}, then a product over channels",
        ),
        Architecture(
            "full conv",
            "convolution",
            partial(CausalConvolution, width, kernel, 1),
            note=f"{taps} between all channels; pyarch has nothing to swap in it",
        ),
    )


def swapped(stock: nn.Module) -> nn.Module | None:
    """A copy with the same parameters, re-typed by `pyarch.swap`; None where there is nothing to swap.

    What attention is told by masks, a rule states instead.
    """
    ours = deepcopy(stock)
    rules = None
    if isinstance(ours, CausalAttention):
        ours.is_masked = False
        rules = {"layer": Config(window=(ours.before, 0))}
    return ours if swap(ours, rules=rules, min_swaps=0).swapped else None


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"

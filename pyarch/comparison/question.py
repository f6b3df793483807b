"""What the user asks: how long, how wide, on what."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Question:
    """The numbers that every architecture is measured on; inputs are (batch, length, width).

    Args:
        lengths: T, tokens of a sequence, ascending.
        batch: B, sequences of a call.
        width: W, features of a token, in and out.
        heads: the numbers of heads of self-attention.
        window: how many tokens before its own a token of windowed attention sees.
        kernel: taps of a convolution, the token's own included.
        budget: seconds of timing for each kind of call, both sides together; a few rounds run in any case.
    """

    lengths: tuple[int, ...] = (128, 512, 2048)
    batch: int = 8
    width: int = 256
    heads: tuple[int, ...] = (1, 8, 16)
    window: int = 128
    kernel: int = 31
    budget: float = 0.25
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    def as_dict(self) -> dict[str, object]:
        """The numbers as plain data."""
        return {
            "lengths": list(self.lengths),
            "batch": self.batch,
            "width": self.width,
            "heads": list(self.heads),
            "window": self.window,
            "kernel": self.kernel,
            "budget": self.budget,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }

"""How far the gradient reaches: what the last output says of inputs d tokens before it.

    reach(d) = || d <c, y[T - 1]> / d x[T - 1 - d] ||   for a random c, over the batch and the width

at torch's initial parameters; training moves it. The textbook picture is a recurrence whose every step
multiplies by 0.9 or 1.1: after 100 tokens 0.9^100 = 2.7e-5 and 1.1^100 = 1.4e4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from pyarch.comparison.question import Question

FADED = 0.01
HALF = 0.5
TEXTBOOK = (0.9, 1.1)
TEXTBOOK_TOKENS = 100
POINTS = 48


@dataclass(frozen=True)
class Reach:
    """The gradient's norm at each distance 0 to T - 1; T is at least 2."""

    norms: tuple[float, ...]

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The norms in units of the largest at a token before; the token itself is no matter of reach."""
        largest = max(self.norms[1:])
        return tuple(norm / largest if largest else 0.0 for norm in self.norms)

    @property
    def half(self) -> int:
        """The largest distance at which the norm is at least half of the largest."""
        return self._farthest(HALF)

    @property
    def faded(self) -> int:
        """The largest distance at which the norm is at least 1 % of the largest; beyond it is less."""
        return self._farthest(FADED)

    @property
    def ends(self) -> int:
        """The largest distance with any gradient at all."""
        return max((distance for distance, norm in enumerate(self.norms) if norm > 0), default=0)

    @property
    def is_whole(self) -> bool:
        """Whether the gradient at the first token is not faded."""
        return self.faded == len(self.norms) - 1

    def sampled(self) -> list[tuple[int, float]]:
        """(distance, share) at distances from 1 on that are spread evenly in the logarithm."""
        return [(distance, self.shares[distance]) for distance in log_spaced(len(self.norms) - 1)]

    def _farthest(self, share: float) -> int:
        tokens_before = range(1, len(self.norms))
        return max((distance for distance in tokens_before if self.shares[distance] >= share), default=0)


def reach_of(module: nn.Module, question: Question, length: int) -> Reach:
    """Measure a module of architectures.py on random input (B, length, W)."""
    generator = torch.Generator().manual_seed(1)
    shape = question.batch, length, question.width
    x = torch.randn(shape, generator=generator).to(question.device, question.dtype).requires_grad_()
    last = module(x)[:, -1]
    cotangent = torch.randn(last.shape, generator=generator).to(last)
    (gradient,) = torch.autograd.grad(last, x, cotangent)
    norms = torch.linalg.vector_norm(gradient.double(), dim=(0, 2)).flip(0)
    return Reach(tuple(norms.tolist()))


def log_spaced(largest: int, points: int = POINTS) -> list[int]:
    """Whole numbers from 1 to `largest`, at most `points`, spread evenly in the logarithm."""
    spread = (round(largest ** (place / (points - 1))) for place in range(points))
    return sorted(set(spread)) if largest else []


def textbook(factor: float) -> list[tuple[int, float]]:
    """(d, factor^d) for the distances of the textbook picture."""
    return [(distance, factor**distance) for distance in log_spaced(TEXTBOOK_TOKENS)]

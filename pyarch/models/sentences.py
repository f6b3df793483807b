"""Sentences of unequal length as one padded tensor: what the packed models read."""

import torch
from torch import Tensor


def ragged(N: int, T: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random words (N, T) int64 and lengths (N,) int64, unsorted, between half of T and T.

    What follows the end of a sentence are words too, not a mark: a model that reads on is misled.
    """
    words = torch.randint(vocabulary, (N, T), generator=generator)
    return words, torch.randint(max(1, T // 2), T + 1, (N,), generator=generator)


def beyond(lengths: Tensor, T: int) -> Tensor:
    """Return a mask (N, T) that is true where a sentence of that length is over."""
    return torch.arange(T, device=lengths.device) >= lengths.unsqueeze(1)

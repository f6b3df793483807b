"""The random stream of dropout: Philox4x32-10 in plain torch.

A block cipher of ten rounds over four 32-bit words: each round multiplies words 0 and 2 by constants, swaps
the halves of the products into place and adds the key by exclusive or; the key grows by Weyl constants from
round to round (Salmon, Moraes, Dror and Shaw, 2011, "Parallel random numbers: as easy as 1, 2, 3", SC11). A
counter and a key give the same words on every device, in any order, so a backward needs no saved mask.

Words are held in int64, always in [0, 2^32).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words from four words of counter and two of key: int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a 64-bit product, which int64 holds up to its sign."""
    product = word * multiplier
    return (product >> 32) & _LOW, product & _LOW


def threshold(dropout_p: float) -> int:
    """The word from which on an element is kept: dropout_p of all words lie below."""
    return min(round(dropout_p * 2**32), _LOW)


def keep_mask(seed: Tensor, dropout_p: float, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """Which probabilities dropout keeps: bool (B, H, Tq, Tk).

    Element (b, h, i, j) is word j % 4 of counter (j // 4, i, b * H + h, 0) under the key (low, high half of
    `seed`, one int64 element), kept when it is not below `threshold(dropout_p)`.
    """
    device = seed.device
    seed = seed.reshape(())
    key = seed & _LOW, (seed >> 32) & _LOW
    blocks = torch.arange((keys + 3) // 4, device=device)
    rows = torch.arange(queries, device=device)[:, None]
    matrices = torch.arange(batch * heads, device=device)[:, None, None]
    words = philox((blocks, rows, matrices, torch.zeros((), dtype=torch.int64, device=device)), key)
    words = torch.stack(words, -1).flatten(-2)  # (B * H, Tq, 4 * blocks)
    return (words[..., :keys] >= threshold(dropout_p)).view(batch, heads, queries, keys)

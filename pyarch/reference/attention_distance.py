"""A bias that depends on how far a key is from a query alone, as (Tq, Tk) numbers and back.

    bias[i, j] = distance_bias[j - i + Tq - 1],   gradient[r] = sum of ds[i, j] over j - i + Tq - 1 = r

Entry 0 is of the last query and the first key, the last entry of the first query and the last key.

Legend: B batch, H query heads, Tq queries, Tk keys, i query, j key.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def distances(queries: int, keys: int) -> int:
    """How many distances there are between so many queries and keys."""
    return max(queries + keys - 1, 0)


def of_pairs(distance_bias: Tensor, queries: int, keys: int) -> Tensor:
    """(B or 1, H or 1, Tq + Tk - 1) as (B or 1, H or 1, Tq, Tk)."""
    *leading, width = distance_bias.shape
    # Rows of `width` read as rows one longer: each begins one column later than the row before it. The last
    # query's comes first. An index would do, but its gradient depends on the number of threads.
    rows = distance_bias[..., None, :].expand(*leading, queries, width).flatten(-2)
    skewed = pad(rows, (0, queries)).reshape(*leading, queries, width + 1)
    return skewed[..., :keys].flip(-2)


def sums_of_distances(of_pairs: Tensor) -> Tensor:
    """(..., Tq, Tk) summed where keys are as far from their queries: (..., Tq + Tk - 1)."""
    *leading, queries, keys = of_pairs.shape
    width = distances(queries, keys)
    # The way of `of_pairs` back: rows of width + 1 read as rows of width.
    rows = pad(of_pairs.flip(-2), (0, width + 1 - keys)).flatten(-2)
    return rows[..., : queries * width].reshape(*leading, queries, width).sum(-2)

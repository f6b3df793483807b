"""Biases that depend on how far a key is from its query: ALiBi's and T5's, as `distance_bias` takes them.

A row of Tq + Tk - 1 numbers a head stands for all Tq * Tk pairs: entry r is of the keys j and queries i with
j - i = r - (Tq - 1). What a bias depends on is the distance of their tokens, j - p with p = i + query_offset.

Legend: H query heads, Tq queries, Tk keys, i query, j key, p position of the query's token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi: for a power of two the geometric sequence 2**(-8 / H), 2**(-16 / H), ..., 2**-8.

    Any other number of heads takes the sequence of the power of two below it, and then every other slope of
    twice that power's, from the first (Press, Smith and Lewis, 2022, arXiv:2108.12409, and their code).

    Args:
        heads: H, at least 1.

    Returns:
        (H,) float32.

    Raises:
        ValueError: heads is less than 1.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    power = 1 << (heads.bit_length() - 1)
    exponents = [-8 * (head + 1) / power for head in range(power)]
    exponents += [-8 * (2 * head + 1) / (2 * power) for head in range(heads - power)]
    return torch.tensor([2**exponent for exponent in exponents], device=device)


def alibi_bias(slopes: int | Tensor, queries: int, keys: int, *, query_offset: int = 0) -> Tensor:
    """Attention with linear biases: -slope * |j - p|, in the causal half as published.

    (Press, Smith and Lewis, 2022, arXiv:2108.12409)

    Args:
        slopes: (H,) floating, differentiable; or H, for those of `alibi_slopes`.
        queries, keys: Tq and Tk.
        query_offset: position of the first query's token.

    Returns:
        (1, H, Tq + Tk - 1), float32, of float64 slopes float64: 16 bits do not hold large distances.

    Raises:
        ValueError: slopes are no row of numbers, or a length is negative.
    """
    if isinstance(slopes, int):
        slopes = alibi_slopes(slopes)
    if slopes.dim() != 1 or not slopes.is_floating_point():
        raise ValueError(f"slopes must be floating and (heads,), got {slopes.dtype} {tuple(slopes.shape)}")
    distance = _distances(queries, keys, query_offset, slopes.device)
    slopes = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
    return (-slopes[:, None] * distance.abs())[None]


def t5_bias(
    table: Tensor,
    queries: int,
    keys: int,
    *,
    bidirectional: bool,
    max_distance: int = 128,
    query_offset: int = 0,
) -> Tensor:
    """T5's learned relative bias: table[bucket(j - p)] (Raffel et al., 2020, arXiv:1910.10683).

    Args:
        table: (buckets, H) floating, differentiable: the weight of T5's `relative_attention_bias`.
        queries, keys: Tq and Tk.
        bidirectional: whether half of the buckets is of keys behind the query, as in T5's encoder; else those
            share the bucket of distance 0, as in its decoder.
        max_distance: from this distance on all share a bucket.
        query_offset: position of the first query's token.

    Returns:
        (1, H, Tq + Tk - 1) in the table's dtype.

    Raises:
        ValueError: table is no table, max_distance leaves nothing to share, or a length is negative.
    """
    if table.dim() != 2 or not table.is_floating_point():
        raise ValueError(
            f"table must be floating and (buckets, heads), got {table.dtype} {tuple(table.shape)}"
        )
    distance = _distances(queries, keys, query_offset, table.device)
    buckets = t5_buckets(distance, table.shape[0], bidirectional=bidirectional, max_distance=max_distance)
    return functional.embedding(buckets, table).T[None]


def t5_buckets(distance: Tensor, buckets: int, *, bidirectional: bool, max_distance: int = 128) -> Tensor:
    """The bucket of T5 that each distance j - p falls into.

    Half of the buckets, or half of each direction's half, hold one distance each; the others grow with the
    logarithm of the distance up to max_distance (Raffel et al., 2020, arXiv:1910.10683, and their code).

    Args:
        distance: int64 of any shape.
        buckets, bidirectional, max_distance: as in `t5_bias`.

    Returns:
        int64 in 0 to buckets - 1, in distance's shape.

    Raises:
        ValueError: there are too few buckets, or max_distance leaves nothing to share.
    """
    one_way = buckets // 2 if bidirectional else buckets
    exact = one_way // 2
    if exact < 1 or max_distance <= exact:
        fewest = 4 if bidirectional else 2
        raise ValueError(
            f"buckets must be at least {fewest} and max_distance more than the {exact} distances that have a "
            f"bucket of their own, got {buckets} buckets and max_distance {max_distance}"
        )
    back = distance.abs() if bidirectional else (-distance).clamp(min=0)
    # In T5's own order of operations, which decides the bucket of distances at a border. Near ones are raised
    # before: a logarithm of 0 has no integer.
    ratio = torch.log(back.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (one_way - exact)).long()
    found = torch.where(back < exact, back, far.clamp(max=one_way - 1))
    return found + one_way * (distance > 0) if bidirectional else found


def _distances(queries: int, keys: int, query_offset: int, device: torch.device) -> Tensor:
    """j - p for every entry: (Tq + Tk - 1,) int64."""
    if queries < 0 or keys < 0:
        raise ValueError(f"queries and keys must be at least 0, got {queries} and {keys}")
    first = 1 - queries - query_offset
    return torch.arange(first, first + max(queries + keys - 1, 0), device=device)

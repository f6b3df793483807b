"""scaled_dot_product_attention: torch's function with windows, bias, sinks, weights and more.

What no call of ours is (complex or nested tensors, leading dimensions that only broadcast, bad input) goes to
torch's own function, whose results and error texts are then the user's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as stock

from pyarch.ops.attention import NO_EXTRAS, draw_seed, run
from pyarch.reference.attention import Extras, Settings

Window = int | tuple[int | None, int | None] | None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window = None,
    dilation: int = 1,
    global_tokens: int | Tensor = 0,
    query_offset: int = 0,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    distance_bias: Tensor | None = None,
    return_weights: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Attend as torch.nn.functional.scaled_dot_product_attention, with more to say about who sees whom.

    out = softmax(scale * query key^T + bias + distance_bias, over the visible keys) value
    (Vaswani et al., 2017, arXiv:1706.03762; windows: Beltagy et al., 2020, arXiv:2004.05150)

    A query that sees no key gives zeros.

    Args:
        query: (B, H, Tq, D); (N, Tq, D), (Tq, D) and more leading dimensions as torch.
        key: (B, Hk, Tk, D), Hk = H, or with `enable_gqa` a divisor of H.
        value: (B, Hk, Tk, Dv).
        attn_mask: bool (True: may attend) or float (added; differentiable), broadcastable to (B, H, Tq, Tk).
        dropout_p: probability of dropping a probability, whatever the mode of any module.
        is_causal: query i sees keys j <= i + query_offset; together with attn_mask both hold.
        scale: None for 1 / sqrt(D).
        window: None, w or (left, right): query i, the token at p = i + query_offset, sees the keys
            j = p + dilation * m for -left <= m <= right; None on a side is unbounded.
        dilation: distance of a window's keys.
        global_tokens: the first n tokens, or by a bool (B, T) any, see all and are seen by all.
        query_offset: position of the first query's token.
        bias: added to the scores, beside attn_mask; broadcastable to (B, H, Tq, Tk), in query's dtype or
            float32.
        key_padding_mask: bool (B, Tk), True where a key is ignored.
        softcap: c of c * tanh(scores / c), before the bias.
        sinks: (H,), one more logit of each head in the softmax's denominator.
        distance_bias: (B or 1, H or 1, Tq + Tk - 1), in query's dtype or float32: entry j - i + Tq - 1 is
            added to the score of query i and key j. Leading dimensions, those of query but its last two, may
            be missing. Only the backends "torch" and "reference" make (Tq, Tk) numbers of it. See
            `alibi_bias` and `t5_bias`.
        return_weights: "heads" for the probabilities (B, H, Tq, Tk), "mean" for their mean over heads.
        return_lse: whether to return log(sum(exp(scores))), (B, H, Tq).

    Returns:
        out (B, H, Tq, Dv) in the query's dtype, or a tuple (out[, weights][, lse]).

    Raises:
        RuntimeError, IndexError, TypeError: as torch's own function, in its words.
        ValueError, TypeError: an option that torch has not does not fit.
        NotImplementedError: a backend asked for by name refuses the call.
    """
    left, right = window_sides(window)
    named, first = (global_tokens, 0) if isinstance(global_tokens, Tensor) else (None, global_tokens)
    for name, number in (("dilation", dilation), ("global_tokens", first), ("query_offset", query_offset)):
        if type(number) is not int and (isinstance(number, bool) or not isinstance(number, _INTEGERS)):
            raise TypeError(f"{name} must be an integer, got {number!r}")

    def by_torch(error: Exception):
        """torch's own result or error; the given one where torch would not see what is asked for."""
        result = stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        beyond = named, bias, key_padding_mask, softcap, sinks, distance_bias, return_weights
        if (left, right, dilation, first, query_offset, return_lse) != _TORCHS or any(
            each is not None for each in beyond
        ):
            raise error
        return result

    is_typed = isinstance(dropout_p, _NUMBERS) and (scale is None or isinstance(scale, _NUMBERS))
    if not (is_typed and isinstance(is_causal, bool) and isinstance(enable_gqa, bool)):
        return by_torch(TypeError("dropout_p and scale must be numbers, is_causal and enable_gqa bools"))
    if not _is_call(query, key, value, attn_mask):
        return by_torch(ValueError("query, key and value must be strided tensors of two dimensions or more"))
    tensors = query, key, value, attn_mask, bias
    if distance_bias is not None and not isinstance(distance_bias, Tensor):
        raise TypeError(f"distance_bias must be a tensor, got {distance_bias!r}")
    if distance_bias is not None:
        distance_bias = _in_three_dimensions(distance_bias, query.shape[:-2])
    if query.dim() != 4:
        tensors = _in_four_dimensions(*tensors)
        if tensors is None:
            return by_torch(ValueError("query, key, value and masks must have the same leading dimensions"))
    queries, keys, values, mask, added = tensors
    if not enable_gqa and keys.shape[1] not in (1, queries.shape[1]):
        return by_torch(ValueError("fewer key heads than query heads need enable_gqa=True"))
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    settings = Settings(
        scale, is_causal, left, right, dilation, first, query_offset, softcap or 0.0, dropout_p
    )
    extras = NO_EXTRAS
    if not (
        mask is None
        and added is None
        and key_padding_mask is None
        and named is None
        and sinks is None
        and distance_bias is None
        and dropout_p == 0
    ):
        is_kept = mask is not None and mask.dtype == torch.bool
        extras = Extras(
            _four(mask) if is_kept else None,
            _four(added) if is_kept or mask is None else _sum(_four(mask), added),
            key_padding_mask,
            named,
            sinks,
            draw_seed(settings, query.device),
            distance_bias,
        )
    found = run(queries, keys, values, extras, settings, return_weights, return_lse, "auto", by_torch)
    return found if query.dim() == 4 else _as_given(found, query.shape[:-2], return_weights == "mean")


_NUMBERS = float, int, torch.SymFloat, torch.SymInt
_INTEGERS = int, torch.SymInt
# What the options of our own are where torch's function would do.
_TORCHS = None, None, 1, 0, 0, False


def window_sides(window: Window) -> tuple[int | None, int | None]:
    """How far a window reaches to the left and to the right."""
    if window is None:
        return None, None
    sides = window if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"window must be an integer or (left, right), got {window!r}")
    for side in sides:
        if side is not None and (isinstance(side, bool) or not isinstance(side, _INTEGERS)):
            raise TypeError(f"window must hold integers or None, got {window!r}")
    return tuple(sides)


def _is_call(query, key, value, attn_mask) -> bool:
    """Whether these are tensors that a call of ours can be made of."""
    for tensor in (query, key, value):
        if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.dim() < 2:
            return False
    if attn_mask is None:
        return True
    return isinstance(attn_mask, Tensor) and not attn_mask.is_nested and 2 <= attn_mask.dim() <= query.dim()


def _four(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dim() >= 4 else mask[(None,) * (4 - mask.dim())]


def _sum(attn_mask: Tensor, bias: Tensor | None) -> Tensor:
    return attn_mask if bias is None else attn_mask + _four(bias)


# -------------------------------------------------------------------------------- other ranks


def _in_four_dimensions(query, key, value, *masks) -> tuple | None:
    """query, key, value and masks of another rank than 4 as 4-D tensors; None where that takes broadcasting.

    (Tq, D) and (N, Tq, D) have one head; more leading dimensions than two are one batch.
    """
    rank, leading = query.dim(), query.shape[:-2]
    if key.dim() != rank or value.dim() != rank:
        return None
    if rank < 4:
        if key.shape[:-2] != leading or value.shape[:-2] != leading:
            return None
        given = (tensor.unsqueeze(-3) for tensor in (query, key, value))
        flat = (mask if mask is None or mask.dim() < 3 else mask.unsqueeze(1) for mask in masks)
        return *(_four(tensor) for tensor in given), *flat
    if key.shape[:-3] != leading[:-1] or value.shape[:-3] != leading[:-1]:
        return None
    flat = (
        mask if mask is None else mask.expand(*leading, *mask.shape[-2:]).flatten(0, -4) for mask in masks
    )
    return *(tensor.flatten(0, -4) for tensor in (query, key, value)), *flat


def _in_three_dimensions(distance_bias: Tensor, leading) -> Tensor:
    """A bias of distances, broadcastable to (*leading, Tq + Tk - 1), as (B or 1, H or 1, Tq + Tk - 1)."""
    rank, given = len(leading) + 1, distance_bias.shape
    distance_bias = distance_bias[(None,) * (rank - distance_bias.dim())]
    if any(size not in (1, wide) for size, wide in zip(distance_bias.shape, leading, strict=False)) or (
        distance_bias.dim() > rank
    ):
        raise ValueError(f"distance_bias {tuple(given)} must be broadcastable to {(*leading, 'distances')}")
    if rank < 3:
        return distance_bias.unsqueeze(-2)[(None,) * (2 - rank)]
    return distance_bias if rank == 3 else distance_bias.expand(*leading, -1).flatten(0, -3)


def _as_given(found, leading, is_mean: bool):
    """Results of a 4-D call in the rank that was given: out, probabilities of heads or their mean, lse."""
    if isinstance(found, Tensor):
        return found.reshape(*leading, *found.shape[-2:])
    out, *others = found
    averaged = leading if len(leading) < 2 else leading[:-1]
    shapes = []
    for each in others:
        if each.dim() == 4:
            shapes.append((*leading, *each.shape[-2:]))
        elif is_mean and each is others[0]:
            shapes.append((*averaged, *each.shape[-2:]))
        else:
            shapes.append((*leading, each.shape[-1]))
    restored = (each.reshape(shape) for each, shape in zip(others, shapes, strict=True))
    return _as_given(out, leading, False), *restored

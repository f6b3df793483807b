"""attention_decode: a few new queries against a preallocated cache of keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyarch.dispatch import settled_backend
from pyarch.ops.attention import DTYPES, NO_EXTRAS, fault_of_settings
from pyarch.ops.attention_call import misfit
from pyarch.ops.attention_decode_call import decode
from pyarch.ops.attention_functions import Window, window_sides
from pyarch.reference.attention import Settings


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor | int,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with the newest queries on all tokens up to them, which a cache holds.

    out = softmax(scale * query key^T, over the keys up to each query) value
    (Vaswani et al., 2017, arXiv:1706.03762; keys split among threads: Dao et al., 2023, "Flash-Decoding")

    With `key` and `value` these are first written into the caches, in place, at the places lengths[b] to
    lengths[b] + Tq of entry b, and query t stands at lengths[b] + t. Without, the caches hold the queries'
    own keys already and query t stands at lengths[b] - Tq + t. It sees the keys up to its own place; what
    lies behind may hold anything. Forward only.

    Args:
        query: (B, H, Tq, D), float32, bfloat16, float16 or float64, any strides; made for few queries.
        key_cache: (B, Hk, S, D), H a multiple of Hk: query head h reads head h // (H / Hk).
        value_cache: (B, Hk, S, Dv).
        lengths: how many tokens each cache holds before the call, (B,) int32 or int64, or one int.
        key, value: (B, Hk, Tq, D) and (B, Hk, Tq, Dv), the new tokens' own; both or neither.
        scale: None for 1 / sqrt(D).
        window: None, w or (left, right): a query sees no key more than `left` before it.
        softcap: c of c * tanh(scores / c).
        sinks: (H,), one more logit of each head in the softmax's denominator; query's dtype or float32.
        return_lse: whether to return log(sum(exp(scores))), (B, H, Tq).

    Returns:
        out (B, H, Tq, Dv) in the query's dtype, contiguous; or (out, lse), lse float32, for float64 float64.

    Raises:
        RuntimeError: a gradient is asked for.
        ValueError, TypeError: shapes, dtypes, lengths or options do not fit; the message says which. Lengths
            on a GPU are not read, and what they must hold is not checked.
        NotImplementedError: a backend asked for by name refuses the call.
    """
    left, right = window_sides(window)
    _refuse_tensors(query, key_cache, value_cache, key, value, sinks)
    batch, _, queries, width = query.shape
    if scale is None:
        scale = 1 / math.sqrt(width)
    settings = Settings(scale, True, left, right, softcap=softcap or 0.0)
    fault = fault_of_settings(NO_EXTRAS, settings)
    if fault is not None:
        raise fault
    places, added = key_cache.shape[2], 0 if key is None else queries
    _refuse_lengths(lengths, query, places, added)
    if key is not None:
        _write(key_cache, key, lengths)
        _write(value_cache, value, lengths)
    first = lengths if key is not None else lengths - queries
    if isinstance(lengths, Tensor):
        positions = first.to(torch.int32).contiguous()
    else:
        positions = torch.full((batch,), first, dtype=torch.int32, device=query.device)
    backend = "auto" if torch.compiler.is_compiling() else settled_backend("auto")
    out, lse = decode(query, key_cache, value_cache, positions, sinks, settings, backend)
    return (out, lse) if return_lse else out


def _write(cache: Tensor, tokens: Tensor, lengths: Tensor | int) -> None:
    """Write the tokens of each entry (B, Hk, Tq, D) behind its length."""
    count = tokens.shape[2]
    if not isinstance(lengths, Tensor):
        cache[:, :, lengths : lengths + count] = tokens
        return
    entries = torch.arange(cache.shape[0], device=cache.device)[:, None]
    places = lengths[:, None] + torch.arange(count, device=cache.device)  # (B, Tq)
    cache[entries, :, places] = tokens.transpose(1, 2)


# -------------------------------------------------------------------------------- which calls are none


def _refuse_tensors(query, key_cache, value_cache, key, value, sinks) -> None:
    tensors = {
        "query": query, "key_cache": key_cache, "value_cache": value_cache, "key": key, "value": value
    }  # fmt: skip
    dtype, device = query.dtype, query.device
    if dtype not in DTYPES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {dtype}")
    if (key is None) != (value is None):
        raise ValueError("key and value must be given both or neither")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} as the query, got {tensor.dtype}")
    for name, tensor in {**tensors, "sinks": sinks}.items():
        if tensor is None:
            continue
        if tensor.device != device or tensor.layout != torch.strided:
            raise ValueError(
                f"{name} must be strided and on {device}, got {tensor.layout} on {tensor.device}"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"attention_decode has no backward and {name} requires a gradient: call it under "
                "torch.no_grad(), or use scaled_dot_product_attention"
            )
    if sinks is not None and sinks.dtype not in (dtype, torch.float32):
        raise TypeError(f"sinks must be {dtype} or torch.float32, got {sinks.dtype}")
    shapes = query.shape, key_cache.shape, value_cache.shape
    wrong = misfit(*shapes, None, None, None, None, None if sinks is None else sinks.shape, None)
    if wrong is not None:
        raise ValueError(wrong)
    if key is None:
        return
    for name, tensor, cache in (("key", key, key_cache), ("value", value, value_cache)):
        wanted = *cache.shape[:2], query.shape[2], cache.shape[3]
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} must be {wanted}, got {tuple(tensor.shape)}")


def _refuse_lengths(lengths: Tensor | int, query: Tensor, places: int, added: int) -> None:
    """Raise for lengths that do not fit into a cache of so many places; those on a GPU are not read."""
    if isinstance(lengths, Tensor):
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
        if tuple(lengths.shape) != (query.shape[0],):
            raise ValueError(f"lengths must be (batch,) = ({query.shape[0]},), got {tuple(lengths.shape)}")
        if lengths.device != query.device:
            raise ValueError(f"lengths must be on {query.device}, got {lengths.device}")
        if torch.compiler.is_compiling() or lengths.device.type != "cpu" or lengths.numel() == 0:
            return
        shortest, longest = (int(each) for each in lengths.aminmax())
    elif isinstance(lengths, int | torch.SymInt) and not isinstance(lengths, bool):
        shortest = longest = lengths
    else:
        raise TypeError(f"lengths must be a tensor or an integer, got {lengths!r}")
    if shortest < 0 or longest + added > places:
        raise ValueError(
            f"lengths must lie in 0 to {places - added}, with {added} new tokens in a cache of {places}, got "
            f"{shortest} to {longest}"
        )

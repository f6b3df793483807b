"""attention_varlen: sequences of unequal length one behind the other, without padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyarch.dispatch import settled_backend
from pyarch.ops.attention import DTYPES, NO_EXTRAS, as_autocast_casts, each_once, fault_of_settings
from pyarch.ops.attention_functions import Window, window_sides
from pyarch.ops.attention_varlen_autograd import forward_of, refuse_ends, run_tracked
from pyarch.ops.plain_calls import under_transform, without_autocast
from pyarch.reference import attention_varlen as reference
from pyarch.reference.attention import Settings


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window = None,
    query_offset: int | str = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend within each of many sequences that stand one behind the other, none of which sees another.

    out = softmax(scale * query key^T, over the visible keys of the same sequence) value
    (Vaswani et al., 2017, arXiv:1706.03762; the layout: Dao et al., 2022, arXiv:2205.14135)

    Sequence s is the queries [cu_seqlens_q[s], cu_seqlens_q[s + 1]) on the keys [cu_seqlens_k[s],
    cu_seqlens_k[s + 1]); either may be empty. A query that sees no key gives zeros. There is no dropout,
    bias, mask or matrix of weights here: `scaled_dot_product_attention` on one sequence has them.

    Args:
        query: (Nq, H, D), the queries of all sequences; float32, bfloat16, float16 or float64, any strides.
        key: (Nk, Hk, D), H a multiple of Hk: query head h reads head h // (H / Hk).
        value: (Nk, Hk, Dv).
        cu_seqlens_q: (S + 1,), int32 or int64, on the query's device: 0, then each sequence's end, the
            last one Nq.
        cu_seqlens_k: the same of the keys, ending at Nk; None: as the queries.
        is_causal: query i of a sequence sees its keys j <= i + query_offset.
        scale: None for 1 / sqrt(D).
        window: None, w or (left, right): query i sees the keys i + query_offset - left to
            i + query_offset + right, inclusive; None on a side is unbounded.
        query_offset: the position of each sequence's first query among its keys; "end": its last query stands
            at its last key, as FlashAttention has it.
        softcap: c of c * tanh(scores / c).
        sinks: (H,), one more logit of each head in the softmax's denominator; query's dtype or float32.
        return_lse: whether to return log(sum(exp(scores))), (H, Nq), -inf where nothing is seen.

    Returns:
        out (Nq, H, Dv) in the query's dtype, contiguous; or (out, lse), lse float32, for float64 float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or options do not fit; the message says which. On a GPU the ends
            are not read, and what they must hold is not checked.
        NotImplementedError: a backend asked for by name refuses the call.
    """
    left, right = window_sides(window)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    _refuse_tensors(query, key, value, cu_seqlens_q, cu_seqlens_k, sinks)
    at_end = query_offset == "end"
    if not at_end and (isinstance(query_offset, bool | str) or not _is_integer(query_offset)):
        raise TypeError(f"query_offset must be an integer or 'end', got {query_offset!r}")
    if scale is None:
        scale = 1 / math.sqrt(query.shape[2])
    settings = Settings(scale, is_causal, left, right, 1, 0, 0 if at_end else query_offset, softcap or 0.0)
    fault = fault_of_settings(NO_EXTRAS, settings)
    if fault is not None:
        raise fault
    query, key, value, _ = as_autocast_casts(query, key, value, NO_EXTRAS)
    is_shared = cu_seqlens_k is cu_seqlens_q
    cu_q = cu_seqlens_q.to(torch.int32).contiguous()
    cu_k = cu_q if is_shared else cu_seqlens_k.to(torch.int32).contiguous()
    tensors, compiling = (query, key, value, cu_q, cu_k, sinks), torch.compiler.is_compiling()
    if not compiling and under_transform():
        refuse_ends(cu_q, query.shape[0], cu_k, key.shape[0])
        arguments = *tensors, settings, at_end
        out, lse = without_autocast(reference.attention, query.device, *arguments)
        return (out, lse) if return_lse else out
    backend = "auto" if compiling else settled_backend("auto")
    if torch.is_grad_enabled() and any(
        each is not None and each.requires_grad for each in (query, key, value, sinks)
    ):
        if compiling:
            apart = cu_k.view_as(cu_k) if is_shared else cu_k
            tensors = *each_once(query, key, value), cu_q, apart, sinks
        out, lse = run_tracked(settings, at_end, backend, *tensors)
    else:
        out, lse = forward_of(*tensors, settings, at_end, False, backend)
    return (out, lse) if return_lse else out


# -------------------------------------------------------------------------------- which calls are none


def _refuse_tensors(query, key, value, cu_q, cu_k, sinks) -> None:
    dtype, device = query.dtype, query.device
    if dtype not in DTYPES or key.dtype != dtype or value.dtype != dtype:
        raise TypeError(
            "query, key and value must have one dtype, float32, bfloat16, float16 or float64, got "
            f"{dtype}, {key.dtype} and {value.dtype}"
        )
    for tensor in (query, key, value, cu_q, cu_k, sinks):
        if tensor is not None and (tensor.device != device or tensor.layout != torch.strided):
            raise ValueError(
                f"all tensors must be strided and on {device}, got {tensor.layout} on {tensor.device}"
            )
    wrong = _misfit(query.shape, key.shape, value.shape)
    if wrong is not None:
        raise ValueError(wrong)
    for name, ends in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if ends.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {ends.dtype}")
        if ends.dim() != 1 or ends.shape[0] < 1:
            raise ValueError(f"{name} must be (sequences + 1,), got {tuple(ends.shape)}")
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must be as long, got {cu_q.shape[0]} and {cu_k.shape[0]}"
        )
    if sinks is not None and sinks.dtype not in (dtype, torch.float32):
        raise TypeError(f"sinks must be {dtype} or torch.float32, got {sinks.dtype}")
    if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
        raise ValueError(f"sinks must be (heads,) = ({query.shape[1]},), got {tuple(sinks.shape)}")


def _misfit(query, key, value) -> str | None:
    """What is wrong with the shapes of a call, in words for an error; None when they fit."""
    if not len(query) == len(key) == len(value) == 3:
        return (
            "query, key and value must be (tokens, heads, width), got "
            f"{len(query)}-D, {len(key)}-D and {len(value)}-D"
        )
    heads, kv_heads = query[1], key[1]
    if value[1] != kv_heads or kv_heads < 1 or heads < 1 or heads % kv_heads:
        return f"{heads} query heads cannot share {kv_heads} key and {value[1]} value heads"
    if value[0] != key[0]:
        return f"key and value must have as many tokens, got {key[0]} and {value[0]}"
    if key[2] != query[2] or query[2] < 1 or value[2] < 1:
        return f"query and key must have one width, at least 1, got {query[2]} and {key[2]}"
    return None


def _is_integer(number) -> bool:
    return isinstance(number, int | torch.SymInt)

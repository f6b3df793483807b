"""Attention on Triton: the host side of the operator's forward, backward and weights.

The kernels are in attention_forward, attention_weights and those that attention_backward names; the plans
decide how they run. Legend: see attention_mask.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import attention_backward
from .attention_call import Call, pattern_of, precision_on
from .attention_mask import FAR
from .attention_plan import plan_forward, plan_weights
from .tuning import architecture_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fp32_precision() -> str:
    """ "tf32" where torch lets its products of float32 matrices use it, else "ieee"."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def call_of(query: Tensor, key: Tensor, value_dim: int, extras, settings) -> Call:
    """The metadata of a call.

    Raises:
        NotImplementedError: a dtype without a kernel, or a sequence of 2**30 tokens or more.
    """
    if query.dtype not in DTYPES:
        raise NotImplementedError(f"dtype={query.dtype}, needs float32, float16 or bfloat16")
    B, H, Tq, D = query.shape
    longest = max(Tq + abs(settings.query_offset), key.shape[2])
    if longest >= FAR.value:
        raise NotImplementedError(f"{longest} tokens, needs fewer than {FAR.value}")
    architecture = architecture_of(query.device)
    return Call(
        dtype=query.dtype, precision=precision_on(architecture, query.dtype, fp32_precision()),
        architecture=architecture, batch=B, heads=H, kv_heads=key.shape[1], queries=Tq, keys=key.shape[2],
        head_dim=D, value_dim=value_dim, scale=settings.scale,
        has_mask=extras.mask is not None,
        has_bias=extras.bias is not None or extras.distance_bias is not None,
        **pattern_of(settings, extras.global_mask is not None),
    )  # fmt: skip


def empty_output(query: Tensor, value_dim: int) -> Tensor:
    """An unwritten (B, H, Tq, Dv), laid out as torch's: in the query's order of dimensions where Dv is D."""
    if query.shape[-1] == value_dim and query.stride(-1) == 1:
        return torch.empty_like(query)
    return torch.empty((*query.shape[:-1], value_dim), dtype=query.dtype, device=query.device)


def forward(query: Tensor, key: Tensor, value: Tensor, extras, settings) -> tuple[Tensor, Tensor]:
    """out_i = sum_j P[i, j] v_j and lse_i of visible keys j (equations: attention_mask, attention_forward).

    Args:
        query: (B, H, Tq, D), key (B, Hk, Tk, D), value (B, Hk, Tk, Dv), any strides, H a multiple of Hk;
            float32, float16 or bfloat16; D and Dv at most 256.
        extras: mask, bias, padding, global_mask, sinks, seed and distance_bias, tensors or None, as the
            operator defines them.
        settings: scale, is_causal, left, right, dilation, global_tokens, query_offset, softcap, dropout_p.

    Returns:
        (out, lse): (B, H, Tq, Dv) in the query's dtype and, where Dv is D, its order of dimensions;
        (B, H, Tq) float32, natural logarithm, -inf for a query that sees nothing, whose out is zero.

    Raises:
        NotImplementedError: a dtype without a kernel, wider heads, or 2**30 tokens or more.
    """
    call = call_of(query, key, value.shape[-1], extras, settings)
    out = empty_output(query, call.value_dim)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    plan_forward(call, query, key, value, extras, out, lse).run(query.device)
    return out.zero_() if call.dropout_p >= 1 else out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    extras,
    settings,
    needs: Sequence[bool],
) -> attention_backward.Gradients:
    """Gradients (query, key, value, bias, sinks, distance_bias) of `forward`, None where not needed.

    Args:
        grad_out: as out, any strides, also expanded ones; grad_lse: as lse, or None for zeros.
        out, lse: what the forward returned. needs: which of the six to compute.

    Returns:
        Each in its tensor's dtype, dense, in its tensor's order of dimensions; bitwise repeatable.

    Raises:
        NotImplementedError: as `forward`.
    """
    call = call_of(query, key, value.shape[-1], extras, settings)
    return attention_backward.run(call, grad_out, grad_lse, query, key, value, out, lse, extras, needs)


def weights(query: Tensor, key: Tensor, lse: Tensor, extras, settings, mean: bool) -> Tensor:
    """What `forward` weighed values with, dropped out.

    Args:
        lse: as the forward returned it. The other arguments are those of `forward`.
        mean: whether to average over the heads, which takes the memory of one.

    Returns:
        (B, H, Tq, Tk), or (B, Tq, Tk) of the mean, contiguous, in the query's dtype.

    Raises:
        NotImplementedError: as `forward`.
    """
    call = call_of(query, key, query.shape[-1], extras, settings)
    shape = (call.batch, call.heads, call.queries, call.keys)
    result = query.new_empty((shape[0], *shape[2:]) if mean else shape)
    if call.dropout_p >= 1:
        return result.zero_()
    if result.numel() > 0:
        plan_weights(call, query, key, lse, extras, result, mean).run(query.device)
    return result

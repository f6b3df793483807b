"""Attention of a few new queries on a cache on Triton: into how many stretches the keys are divided, and the
host side.

The kernels are in attention_decode_kernels, which has the legend. The host knows the places of a cache, not
how many are filled, and reads nothing back: a program finds its stretch of what is filled by itself.
"""

from types import SimpleNamespace

import torch
import triton
from torch import Tensor

from .attention import call_of
from .attention_backward import width_of
from .attention_call import Call, alignment_of, strides_named
from .attention_decode_kernels import attention_combine_kernel, attention_decode_kernel
from .attention_tuning import MOST_SPLITS, tuning
from .launch import Launch

# Elements of acc that a combining program reads at a time.
COMBINED_ELEMENTS = 2048


def multiprocessors(device: torch.device) -> int:
    """How many of them a device has; 1 where programs run one after another."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows_of(call: Call) -> int:
    """Rows of one key head: the new queries of its group of query heads."""
    return call.queries * call.heads // max(call.kv_heads, 1)


def splits_of(call: Call, multiprocessors: int) -> int:
    """Stretches that the keys of a head are divided into: enough for all multiprocessors, as far as a stretch
    keeps its least number of tiles."""
    tile, split = call.tile("decode"), tuning(call.architecture).splitting
    heads = call.batch * call.kv_heads * triton.cdiv(rows_of(call), tile.block_m)
    tiles = triton.cdiv(min(call.keys, call.left + call.queries), tile.block_n)
    wanted = multiprocessors * split.programs_per_multiprocessor // max(heads, 1)
    return max(1, min(wanted, tiles // split.tiles_at_least, MOST_SPLITS))


def plan_stretches(
    call: Call, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, parts: tuple[Tensor, ...]
) -> Launch:
    """The launch that attends to the stretches; parts: acc, highest, total."""
    tile = call.tile("decode")
    acc, highest, total = parts
    splits = highest.shape[-1]
    row_tiles = triton.cdiv(rows_of(call), tile.block_m)
    return Launch(
        kernel=attention_decode_kernel,
        grid=call.batch * call.kv_heads * row_tiles * splits,
        arguments=dict(
            q_ptr=query, k_ptr=key, v_ptr=value, positions_ptr=positions,
            acc_ptr=acc, highest_ptr=highest, total_ptr=total,
            Hk=call.kv_heads, group=call.heads // max(call.kv_heads, 1), Tq=call.queries, S=call.keys,
            row_tiles=row_tiles, splits=splits, left=call.left, scale=call.scale, softcap=call.softcap,
            **strides_named(query, "q", "bhtd"), **strides_named(key, "k", "bhtd"),
            **strides_named(value, "v", "bhtd"),
        ),
        constants=dict(
            HAS_SOFTCAP=call.softcap != 0, D=call.head_dim, DV=call.value_dim,
            PRECISION=call.precision, ALIGN=alignment_of(key, value),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_D=width_of(call.head_dim), BLOCK_DV=width_of(call.value_dim),
        ),
        options=tile.options(),
    )  # fmt: skip


def plan_combine(
    call: Call, parts: tuple[Tensor, ...], sinks: Tensor | None, out: Tensor, lse: Tensor
) -> Launch:
    """The launch that adds the stretches up."""
    acc, highest, total = parts
    block_dv = width_of(call.value_dim)
    return Launch(
        kernel=attention_combine_kernel,
        grid=lse.numel(),
        arguments=dict(
            acc_ptr=acc, highest_ptr=highest, total_ptr=total, sinks_ptr=sinks, out_ptr=out, lse_ptr=lse,
            H=call.heads, Tq=call.queries, splits=highest.shape[-1],
        ),
        constants=dict(
            DV=call.value_dim, MOST_SPLITS=MOST_SPLITS, BLOCK_S=COMBINED_ELEMENTS // block_dv,
            BLOCK_DV=block_dv,
        ),
        options=dict(num_warps=4, num_stages=1),
    )  # fmt: skip


def forward(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    settings,
) -> tuple[Tensor, Tensor]:
    """out_i = sum_j P[i, j] v_j and lse_i of the visible keys j of a cache.

    Args:
        query: (B, H, Tq, D), key_cache (B, Hk, S, D), value_cache (B, Hk, S, Dv), any strides, H a multiple
            of Hk; float32, float16 or bfloat16; D and Dv at most 256. What no query sees may hold anything.
        positions: (B,) int32, where the first query of each entry stands: query t sees keys
            j <= positions[b] + t. Where that is negative it sees nothing.
        sinks: (H,) or None.
        settings: scale, left and softcap count; every call is causal, without dilation, global tokens and
            dropout.

    Returns:
        (out, lse): (B, H, Tq, Dv) in the query's dtype, contiguous; (B, H, Tq) float32, natural logarithm,
        -inf for a query that sees nothing, whose out is zero.

    Raises:
        NotImplementedError: a dtype without a kernel, wider heads, or 2**30 places or more.
    """
    none = SimpleNamespace(mask=None, bias=None, global_mask=None, distance_bias=None)
    call = call_of(query, key_cache, value_cache.shape[-1], none, settings)
    splits = splits_of(call, multiprocessors(query.device))
    rows = query.shape[:3]
    out = torch.empty((*rows, call.value_dim), dtype=query.dtype, device=query.device)
    lse, highest, total = (
        torch.empty(shape, dtype=torch.float32, device=query.device)
        for shape in (rows, (*rows, splits), (*rows, splits))
    )
    acc = torch.empty((*rows, splits, call.value_dim), dtype=torch.float32, device=query.device)
    parts = acc, highest, total
    plan_stretches(call, query, key_cache, value_cache, positions, parts).run(query.device)
    plan_combine(call, parts, sinks, out, lse).run(query.device)
    return out, lse

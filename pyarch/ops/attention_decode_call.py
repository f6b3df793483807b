"""Attention of new queries on a cache: which backend runs a call, and the operator for torch.compile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyarch import hardware
from pyarch.dispatch import Backend, Op, Reasons, accepts_all
from pyarch.ops.attention_call import attention_triton_refusals
from pyarch.ops.kernel_refusals import cpu_refusals, cuda_refusals
from pyarch.ops.plain_calls import is_plain, without_autocast
from pyarch.reference.attention import Settings


class DecodeCall(NamedTuple):
    """What a backend may ask about a call.

    Args:
        batch, heads, kv_heads, queries, keys, head_dim, value_dim: B, H, Hk, Tq, S, D and Dv.
        left: how far the window reaches back, None without bound.
        softcap, sinks: whether there are any.
    """

    device: str
    architecture: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    left: int | None = None
    softcap: bool = False
    sinks: bool = False


def _describe(query: Tensor, key: Tensor, value: Tensor, sinks, settings: Settings) -> DecodeCall:
    return DecodeCall(
        query.device.type,
        hardware.architecture(query.device),
        query.dtype,
        query.shape[0],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        key.shape[2],
        query.shape[3],
        value.shape[3],
        settings.left,
        settings.softcap != 0,
        sinks is not None,
    )


def _torch_refusals(call: DecodeCall) -> Reasons:
    if call.softcap:
        yield "softcap, stock SDPA has none"
    if call.sinks:
        yield "sinks, stock SDPA has none"
    if 0 in (call.batch, call.queries, call.keys):
        yield "an empty query or key, of which stock SDPA gives no lse"


DECODE = Op(
    "attention_decode",
    (
        Backend("triton", "pyarch.triton_kernels.attention_decode:forward", attention_triton_refusals),
        Backend("cuda", "pyarch.cuda_kernels.attention_decode:forward", cuda_refusals),
        Backend("cpu", "pyarch.ops.attention_decode_cpu:forward", cpu_refusals),
        Backend("torch", "pyarch.ops.attention_decode_torch:forward", _torch_refusals),
        Backend("reference", "pyarch.reference.attention_decode:forward", accepts_all),
    ),
)

_library = torch.library.Library("pyarch", "FRAGMENT")
_library.define(
    "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor positions, Tensor? sinks, "
    "float scale, bool is_causal, SymInt? left, SymInt? right, SymInt dilation, SymInt global_tokens, "
    "SymInt query_offset, float softcap, float dropout_p, str backend) -> (Tensor, Tensor)"
)


def refuse_positions(positions: Tensor, query: Tensor, key_cache: Tensor) -> None:
    """Raise ValueError for positions from which queries see beyond the cache; those on a GPU are not read."""
    if positions.device.type != "cpu" or not positions.numel():
        return
    last = int(positions.max()) + query.shape[2]
    if last > key_cache.shape[2]:
        raise ValueError(f"the last query stands at place {last - 1} of a cache of {key_cache.shape[2]}")


def _forward(query, key_cache, value_cache, positions, sinks, *flat):
    *numbers, backend = flat
    settings = Settings(*numbers)
    refuse_positions(positions, query, key_cache)
    run = DECODE.choose(_describe(query, key_cache, value_cache, sinks, settings), backend).run
    return without_autocast(run, query.device, query, key_cache, value_cache, positions, sinks, settings)


def _forward_fake(query, key_cache, value_cache, *_):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((*query.shape[:3], value_cache.shape[3]))
    return out, query.new_empty(query.shape[:3], dtype=wide)


_library.impl("attention_decode", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("pyarch::attention_decode", _forward_fake, lib=_library)
_forward_op = torch.ops.pyarch.attention_decode.default


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    settings: Settings,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out and lse by the backend that is chosen, through the opaque operator where somebody watches."""
    present = [each for each in (query, key_cache, value_cache, positions, sinks) if each is not None]
    way = _forward if is_plain(present) and query.device.type != "meta" else _forward_op
    return way(query, key_cache, value_cache, positions, sinks, *settings, backend)

"""What is known of a call on sequences of unequal length before it runs, and which backend may run it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyarch import hardware
from pyarch.dispatch import Backend, Op, Reasons, accepts_all
from pyarch.ops.attention_call import attention_triton_backward_refusals, attention_triton_refusals
from pyarch.ops.kernel_refusals import cpu_refusals, cuda_refusals
from pyarch.reference.attention import Settings


class VarlenCall(NamedTuple):
    """What a backend may ask about a call; forward and backward share it.

    Args:
        sequences, queries, keys: S, Nq and Nk, of all sequences together.
        heads, kv_heads, head_dim, value_dim: H, Hk, D and Dv.
        is_causal, left, right, query_offset: as in `Settings`.
        at_end: whether each sequence's last query stands at its last key.
        softcap, sinks: whether there are any.
        save: whether a backward will follow.
    """

    device: str
    architecture: str
    dtype: torch.dtype
    sequences: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    is_causal: bool = False
    left: int | None = None
    right: int | None = None
    query_offset: int = 0
    at_end: bool = False
    softcap: bool = False
    sinks: bool = False
    save: bool = False

    @property
    def distance_bias(self) -> bool:
        """There is none."""
        return False


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    sinks: Tensor | None,
    settings: Settings,
    at_end: bool,
    save: bool,
) -> VarlenCall:
    """The metadata of a call on these tensors."""
    return VarlenCall(
        query.device.type,
        hardware.architecture(query.device),
        query.dtype,
        cu_q.shape[0] - 1,
        query.shape[0],
        key.shape[0],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        value.shape[2],
        settings.is_causal,
        settings.left,
        settings.right,
        settings.query_offset,
        at_end,
        settings.softcap != 0,
        sinks is not None,
        save,
    )


def _torch_refusals(call: VarlenCall) -> Reasons:
    if call.softcap:
        yield "softcap, stock SDPA has none"
    if call.sinks:
        yield "sinks, stock SDPA has none"


def _op(name: str, function: str, triton) -> Op:
    return Op(
        name,
        (
            Backend("triton", f"pyarch.triton_kernels.attention_varlen:{function}", triton),
            Backend("cuda", f"pyarch.cuda_kernels.attention_varlen:{function}", cuda_refusals),
            Backend("cpu", f"pyarch.ops.attention_varlen_cpu:{function}", cpu_refusals),
            Backend("torch", f"pyarch.ops.attention_varlen_torch:{function}", _torch_refusals),
            Backend("reference", f"pyarch.reference.attention_varlen:{function}", accepts_all),
        ),
    )


VARLEN_FORWARD = _op("attention_varlen_forward", "forward", attention_triton_refusals)
VARLEN_BACKWARD = _op("attention_varlen_backward", "backward", attention_triton_backward_refusals)

"""What is known of an attention call without its data, and the arguments that all its kernels take.

Shapes, strides and dtypes only, so meta tensors do. Legend: see attention_mask.
"""

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_mask import FAR
from .attention_sequences import slots_of
from .attention_tiles import NARROWEST
from .attention_tuning import Tile, tuning


@dataclass(frozen=True)
class Call:
    """What is known of a call without its data.

    Args:
        dtype: of query, key and value.
        precision: of float32 products, "ieee" or "tf32".
        architecture: "sm_90", "gfx942", ...; "default" without a GPU.
        batch, heads, kv_heads, queries, keys, head_dim, value_dim: B, H, Hk, Tq, Tk, D, Dv.
        left, right, ahead: reach of the window and of causality in positions; FAR where unbounded.
        has_global: whether global tokens are exempt from a window.
        has_mask, has_bias: whether there is a bool mask, or a bias of either kind.
        tiles_of_neighbours: whether tiles hold neighbours in spite of a dilation.
        sequences: how many lie one behind the other in Tq and in Tk (attention_sequences), None for a batch.
        at_end: whether the last query of each sequence stands at its last key, in place of query_offset.
        The others are those of the operator's settings.
    """

    dtype: torch.dtype
    precision: str
    architecture: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    scale: float
    left: int = FAR.value
    right: int = FAR.value
    ahead: int = FAR.value
    dilation: int = 1
    global_tokens: int = 0
    has_global: bool = False
    query_offset: int = 0
    softcap: float = 0.0
    dropout_p: float = 0.0
    has_mask: bool = False
    has_bias: bool = False
    tiles_of_neighbours: bool = False
    sequences: int | None = None
    at_end: bool = False

    @property
    def step(self) -> int:
        """Distance of a tile's members: the dilation, where no global token joins its residue classes."""
        return 1 if self.has_global or self.tiles_of_neighbours else self.dilation

    @property
    def lattice(self) -> bool:
        return self.dilation != self.step

    @property
    def has_dropout(self) -> bool:
        """Whether a kernel draws; dropout of everything leaves nothing to draw."""
        return 0 < self.dropout_p < 1

    def tile(self, kernel: str) -> Tile:
        """The tile of a kernel, one of attention_tuning.KERNELS.

        Raises:
            NotImplementedError: heads wider than any row of the table.
        """
        product = "16" if self.dtype != torch.float32 else self.precision
        changed = self.has_mask or self.has_bias or self.softcap or self.dropout_p or self.has_global
        scores = "changed" if changed else "plain"
        return tuning(self.architecture).tile(kernel, product, scores, max(self.head_dim, self.value_dim))

    def numbers(self) -> dict[str, int | float]:
        """The plain arguments that every kernel of the family takes, by name."""
        return dict(
            H=self.heads, group=self.heads // max(self.kv_heads, 1), Tq=self.queries, Tk=self.keys,
            scale=self.scale, softcap=self.softcap, step=self.step, dilation=self.dilation,
            left=self.left, right=self.right, ahead=self.ahead, query_offset=self.query_offset,
            global_tokens=self.global_tokens,
            threshold=min(round(self.dropout_p * 2**32), 2**32 - 1) - 2**31,
            keep_scale=1 / (1 - self.dropout_p) if self.has_dropout else 1.0,
        )  # fmt: skip

    def flags(self) -> dict[str, bool]:
        """The compile-time constants that every kernel of the family takes, by name."""
        return dict(
            LATTICE=self.lattice, CLASSES=self.step != 1, HAS_GLOBAL=self.has_global,
            HAS_SOFTCAP=self.softcap != 0, HAS_DROPOUT=self.has_dropout,
        )  # fmt: skip


def pattern_of(settings, has_global_mask: bool) -> dict[str, int | bool]:
    """The fields of a `Call` that the operator's settings give: reaches in positions, what is global."""
    windowed = settings.left is not None or settings.right is not None or settings.dilation != 1

    def reach(side: int | None) -> int:
        return FAR.value if side is None else min(side * settings.dilation, FAR.value)

    return dict(
        left=reach(settings.left), right=reach(settings.right), ahead=0 if settings.is_causal else FAR.value,
        dilation=settings.dilation, global_tokens=settings.global_tokens,
        has_global=windowed and (settings.global_tokens > 0 or has_global_mask),
        query_offset=settings.query_offset, softcap=settings.softcap, dropout_p=settings.dropout_p,
    )  # fmt: skip


def precision_on(architecture: str, dtype: torch.dtype, wanted: str) -> str:
    """The precision of products: only float32 on NVIDIA's tensor cores has a choice of "tf32"."""
    return wanted if dtype == torch.float32 and architecture.startswith("sm_") else "ieee"


def strides_named(tensor: Tensor, suffix: str, dims: str) -> dict[str, int]:
    """Strides as arguments, "bhtd" of suffix "q" as stride_qb to stride_qd."""
    return {f"stride_{suffix}{dim}": stride for dim, stride in zip(dims, tensor.stride(), strict=True)}


def broadcast_strides(tensor: Tensor | None, suffix: str, dims: str) -> dict[str, int]:
    """As `strides_named`, 0 along dimensions of one element, that any index reads it; 0 for None."""
    if tensor is None:
        return {f"stride_{suffix}{dim}": 0 for dim in dims}
    strides = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return {f"stride_{suffix}{dim}": stride for dim, stride in zip(dims, strides, strict=True)}


def as_bytes(tensor: Tensor | None) -> Tensor | None:
    """A bool tensor as uint8, without a copy."""
    return None if tensor is None else tensor.view(torch.uint8)


def extras_named(extras, call: Call) -> dict[str, Tensor | int | None]:
    """The tensors of masks, biases and dropout and their strides, as arguments.

    A global mask without a window changes nothing and is left out.
    """
    global_mask = extras.global_mask if call.has_global else None
    distance_bias = extras.distance_bias
    if distance_bias is not None and distance_bias.stride(-1) != 1:
        distance_bias = distance_bias.contiguous()
    return dict(
        mask_ptr=as_bytes(extras.mask), bias_ptr=extras.bias, distance_ptr=distance_bias,
        padding_ptr=as_bytes(extras.padding),
        global_ptr=as_bytes(global_mask), T=0 if global_mask is None else global_mask.shape[1],
        seed_ptr=extras.seed if call.has_dropout else None,
        **broadcast_strides(extras.mask, "m", "bhts"),
        **broadcast_strides(extras.bias, "b", "bhts"),
        **broadcast_strides(distance_bias, "r", "bhd"),
        **broadcast_strides(extras.padding, "p", "bs"),
        **broadcast_strides(global_mask, "g", "bt"),
    )  # fmt: skip


def alignment_of(*tensors: Tensor) -> int:
    """What divides the strides between batches, heads and rows of all tensors, at most 16."""
    return gcd(NARROWEST, *(stride for tensor in tensors for stride in tensor.stride()[:3]))


class Starts(NamedTuple):
    """Where sequences begin among the tokens of queries and of keys: (sequences + 1,) int32, contiguous."""

    queries: Tensor
    keys: Tensor


def starts_named(starts: Starts | None) -> dict[str, Tensor | int | None]:
    """The sequences as arguments; None for a batch."""
    if starts is None:
        return dict(starts_q_ptr=None, starts_k_ptr=None, sequences=0)
    return dict(starts_q_ptr=starts.queries, starts_k_ptr=starts.keys, sequences=len(starts.queries) - 1)


def tiles_of(call: Call, length: int, block: int) -> int:
    """Tiles of `length` tokens of a head, those of every residue class or sequence counted."""
    if call.sequences is not None:
        return slots_of(length, call.sequences, block)
    largest_class = -(-length // call.step)
    return -(-largest_class // block) * call.step

"""What a call of a MultiheadAttention says, as the operator takes it: which sizes, which keys are hidden.

torch has several kinds of masks: bool ones hide where True, floating ones add; (L, S) ones are for every
head, (N * H, L, S) ones for each. The operator has bool masks (True = visible), a bias, and padding, all of
them views of what was given wherever that can be.

Legend: N batch, H heads, L queries, S keys, E width (embed_dim).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyarch.nn.config import Config
from pyarch.ops import attention
from pyarch.ops.kernel_refusals import KERNEL_DTYPES
from pyarch.ops.plain_calls import under_transform


class Call(NamedTuple):
    """A call that the operator answers.

    Args:
        batch, queries, keys: N, L and S; an unbatched call has N = 1.
        is_causal: whether queries see no later keys.
        mask: bool, True = visible, (1 or N, 1 or H, L, S).
        bias: floating, added to the scores, (1 or N, 1 or H, 1 or L, S).
        padding: bool, True = hidden, (N, S).
    """

    batch: int
    queries: int
    keys: int
    is_causal: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    padding: Tensor | None = None


def read(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Call | None:
    """The call as the operator takes it, or None where torch's own forward answers it, or raises.

    As in torch, the hint `is_causal` goes before its mask where neither padding nor weights are asked for.
    """
    sizes = _sizes(module, query, key, value)
    if sizes is None or (is_causal and attn_mask is None):
        return None
    batch, queries, keys = sizes
    is_hint_heeded = is_causal and key_padding_mask is None and not need_weights
    mask = bias = padding = None
    if is_hint_heeded:
        if not _is_mask(attn_mask, query) or attn_mask.dim() not in (2, 3):
            return None
    elif attn_mask is not None:
        squares = _squares(attn_mask, query, *sizes, module.num_heads)
        if squares is None:
            return None
        mask, bias = (squares.logical_not(), None) if squares.dtype == torch.bool else (None, squares)
    if key_padding_mask is not None:
        ends = (batch, keys) if query.dim() == 3 else (keys,)
        if not _is_mask(key_padding_mask, query) or key_padding_mask.shape != ends:
            return None
        rows = key_padding_mask.view(batch, keys) if query.dim() == 2 else key_padding_mask
        if rows.dtype == torch.bool:
            padding = rows
        elif _only_hides(rows) and (bias is None or bias.dtype == rows.dtype):
            if not _can_be_added(rows, query, need_weights):
                return None
            padding = rows != 0
        else:
            rows = rows[:, None, None, :]
            bias = rows if bias is None else bias + rows
    if bias is not None and not _can_be_added(bias, query, need_weights):
        return None
    return Call(batch, queries, keys, is_hint_heeded, mask, bias, padding)


def _sizes(module: nn.MultiheadAttention, query, key, value) -> tuple[int, int, int] | None:
    """N, L and S of inputs that fit each other and the layer, or None."""
    if torch.jit.is_tracing() or not all(isinstance(each, Tensor) for each in (query, key, value)):
        return None
    if query.is_nested or key.is_nested or value.is_nested or query.is_meta:
        return None
    if module.training and not _is_probability(module.dropout):
        return None
    if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
        return None
    if query.shape[-1] != module.embed_dim or key.shape[-1] != module.kdim or value.shape[-1] != module.vdim:
        return None
    if key.shape[:-1] != value.shape[:-1] or not _are_of_kernel_kind(query, key, value):
        return None
    if query.dim() == 2:
        return 1, query.shape[0], key.shape[0]
    along, across = (1, 0) if module.batch_first else (0, 1)
    if query.shape[across] != key.shape[across]:
        return None
    return query.shape[across], query.shape[along], key.shape[along]


def _is_probability(dropout) -> bool:
    return isinstance(dropout, int | float) and 0 <= dropout <= 1


def _are_of_kernel_kind(*inputs: Tensor) -> bool:
    """Whether the inputs have a dtype that the kernels know; the products check that of the weights."""
    dtypes = {each.dtype for each in inputs}
    return dtypes.issubset(KERNEL_DTYPES) and (len(dtypes) == 1 or torch._C._is_any_autocast_enabled())


def _is_mask(mask, query: Tensor) -> bool:
    if not isinstance(mask, Tensor) or mask.device != query.device:
        return False
    return mask.dtype == torch.bool or mask.is_floating_point()


def _squares(mask, query: Tensor, batch: int, queries: int, keys: int, heads: int) -> Tensor | None:
    """An attn_mask as (1, 1, L, S) or (N, H, L, S), a view; None where torch does not know its shape."""
    if not _is_mask(mask, query):
        return None
    if mask.shape == (queries, keys):
        return mask[None, None]
    if mask.shape == (batch * heads, queries, keys):
        return mask.unflatten(0, (batch, heads))
    return None


def _only_hides(padding: Tensor) -> bool:
    """Whether numbers to add are what torch.nn.TransformerEncoder makes of bools: 0 and -inf.

    Keys that are hidden cost nothing, while numbers are added to the scores of all. Only where reading the
    numbers does not wait for a device.
    """
    if padding.device.type != "cpu" or padding.requires_grad or torch.compiler.is_compiling():
        return False
    if under_transform() or type(padding) is not Tensor:
        return False
    return bool(((padding == 0) | (padding == -torch.inf)).all())


def _can_be_added(bias: Tensor, query: Tensor, need_weights: bool) -> bool:
    """Whether torch, too, adds numbers of this dtype to the scores."""
    if torch._C._is_any_autocast_enabled():
        return bias.dtype in KERNEL_DTYPES
    return bias.dtype == query.dtype or (bias.dtype == torch.float32 and not need_weights)


# -------------------------------------------------------------------------------- as torch does it


def is_fused_by_torch(module: nn.MultiheadAttention, query, key, value, key_padding_mask, attn_mask) -> bool:
    """Whether torch's own forward would take its fused path.

    There it heeds a mask before the hint `is_causal`, ignores a hint without a mask, and gives a result that
    is contiguous, where step by step it gives one that lies sequence first.
    """
    if not (query is key and key is value and module.batch_first) or module.training:
        return False
    if not isinstance(query, Tensor) or query.dim() != 3:
        return False
    if module.in_proj_weight is None or module.in_proj_bias is None or module.num_heads % 2:
        return False
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return False
    if any(isinstance(mask, Tensor) and mask.is_floating_point() for mask in (key_padding_mask, attn_mask)):
        return False
    if not torch.backends.mha.get_fastpath_enabled() or torch.is_autocast_enabled():
        return False
    return not torch.is_grad_enabled() or not any(
        each.requires_grad
        for each in (
            query,
            module.in_proj_weight,
            module.in_proj_bias,
            module.out_proj.weight,
            module.out_proj.bias,
        )
    )


def warn_of_two_kinds(padding, mask, padding_name: str, mask_name: str) -> None:
    """torch's warning of masks of different dtypes."""
    if isinstance(padding, Tensor) and isinstance(mask, Tensor) and padding.dtype != mask.dtype:
        warnings.warn(
            f"Support for mismatched {padding_name} and {mask_name} "
            "is deprecated. Use same type for both instead.",
            stacklevel=3,
        )


def with_pattern(
    attn_mask: Tensor | None, is_causal: bool, config: Config, query: Tensor, key: Tensor, batch_first: bool
) -> Tensor:
    """An attn_mask for torch's own forward, without a hint, that also hides what the window hides."""
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    if query.is_nested:
        raise NotImplementedError("a window over nested tensors: give padded ones and a key_padding_mask")
    along = 1 if batch_first and query.dim() == 3 else 0
    pattern = settings_of(config, scale=1.0)
    sizes = query.shape[along], key.shape[along]
    hidden = attention.visible(attention.Extras(), pattern, *sizes, query.device)[0, 0].logical_not()
    if attn_mask is None:
        return hidden
    return attn_mask | hidden if attn_mask.dtype == torch.bool else attn_mask.masked_fill(hidden, -torch.inf)


def settings_of(
    config: Config, scale: float, is_causal: bool = False, dropout_p: float = 0.0
) -> attention.Settings:
    """A layer's numbers as the operator's Settings."""
    left, right = config.window or (None, None)
    return attention.Settings(
        scale,
        is_causal,
        left,
        right,
        config.window_dilation,
        config.global_tokens if config.has_pattern else 0,
        dropout_p=dropout_p,
    )

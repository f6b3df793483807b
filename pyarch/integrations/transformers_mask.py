"""The mask that transformers asks for before the first layer: a pattern where one says all, else a tensor.

A pattern stays a tensor to models that handle their masks: `PatternMask` has the shape of the mask and no
memory, and becomes the mask that "sdpa" builds as soon as anything but our attention reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.utils.import_utils import is_tracing

from pyarch.ops.plain_calls import is_plain, under_transform

Window = tuple[int | None, int | None]


class Pattern(NamedTuple):
    """Who sees whom, in the options of pyarch.ops.scaled_dot_product_attention.

    Args:
        is_causal, window, query_offset: as there.
        key_padding_mask: bool (B, Tk), True where a key is padding, or None.
    """

    is_causal: bool
    window: Window | None
    query_offset: int
    key_padding_mask: Tensor | None


class PatternMask(Tensor):
    """A bool mask (B, 1, Tq, Tk), True where a query sees a key, that exists as a pattern until it is read.

    Attributes:
        pattern: None once the mask was read, when its values may have been changed.
    """

    pattern: Pattern | None
    _build: Callable[[], Tensor]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], pattern: Pattern, build: Callable[[], Tensor], device):
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.pattern, mask._build = pattern, build
        return mask

    def read(self) -> Tensor:
        """The mask as a plain tensor, always the same one."""
        if self.pattern is not None:
            self.pattern, built = None, self._build()
            self._build = lambda: built
        return self._build()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(PatternMask, PatternMask.read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"PatternMask({tuple(self.shape)}, {self.pattern or self._build()})"


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """The mask of a call in transformers' terms, as transformers.masking_utils.sdpa_mask, which is the truth.

    Args:
        batch_size, q_length, kv_length: B, Tq and Tk.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: whether a query at one position sees a key at another.
        attention_mask: bool (B, positions), False on padding, or None.
        local_size: W of a sliding window.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether None may stand for a causal mask, and for
            one that hides nothing.
        device: of the mask.
        others: what transformers adds for other implementations.

    Returns:
        None where the layer's own `is_causal` says all, a `PatternMask` for causal, sliding and padded
        masks, else a bool tensor (B, 1, Tq, Tk).
    """
    build = partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        device=device,
        **others,
    )
    skips = dict(
        allow_is_causal_skip=allow_is_causal_skip, allow_is_bidirectional_skip=allow_is_bidirectional_skip
    )
    # torch.compile looks no further than this: it takes neither our tensor nor a look into functions.
    if is_tracing(attention_mask) or under_transform():
        return build(**skips)
    numbers = batch_size, q_length, kv_length, q_offset, kv_offset
    reach = _reach(mask_function, local_size)
    if (
        reach is None
        or any(type(each) is not int for each in numbers)
        or not _is_padding(attention_mask, batch_size)
    ):
        return build(**skips)
    is_causal, left, right = reach
    offset = q_offset - kv_offset
    is_causal = is_causal and offset < kv_length - 1
    left = left if left is not None and q_length - 1 + offset > left else None
    right = right if right is not None and offset + right < kv_length - 1 else None
    window = None if left is right is None else (left, right)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        padding = None if padding.all() else ~padding
    if padding is None and window is None:
        sees_all = not is_causal and (allow_is_bidirectional_skip or (allow_is_causal_skip and q_length == 1))
        if sees_all or (is_causal and allow_is_causal_skip and offset == 0 and q_length == kv_length):
            return None
    return PatternMask(
        (batch_size, 1, q_length, kv_length),
        Pattern(is_causal, window, offset if is_causal or window else 0, padding),
        partial(build, allow_is_causal_skip=False, allow_is_bidirectional_skip=False),
        device,
    )


def _is_padding(attention_mask: Tensor | None, batch_size: int) -> bool:
    """Whether a mask of padding, if any, is a plain one of a row for each sequence."""
    if attention_mask is None:
        return is_plain(())
    return (
        is_plain((attention_mask,))
        and attention_mask.dtype == torch.bool
        and attention_mask.dim() == 2
        and len(attention_mask) == batch_size
    )


# -------------------------------------------------------------------------------- known patterns


def _reach(mask_function: Callable, size: int | None) -> tuple[bool, int | None, int | None] | None:
    """Whether a mask is causal, and how far it reaches to the left and right; None for any other mask."""
    known = [(causal_mask_function, (True, None, None)), (bidirectional_mask_function, (False, None, None))]
    if type(size) is int and size > 0:
        known.append((sliding_window_causal_mask_function(size), (True, size - 1, None)))
        known.append((sliding_window_bidirectional_mask_function(size), (False, size, size)))
    return next((reach for function, reach in known if _is_same(mask_function, function)), None)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two functions run the same code on the same values, which are functions or integers."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if not isinstance(one, FunctionType):
        return type(one) is int and one == other
    if one.__code__ is not other.__code__:
        return False
    try:
        held = [tuple(cell.cell_contents for cell in each.__closure__ or ()) for each in (one, other)]
    except ValueError:  # a variable that has no value yet
        return False
    return _is_same(*held)

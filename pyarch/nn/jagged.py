"""Attention modules over jagged nested tensors (N, *, E): their rows without padding, by attention_varlen.

torch's own modules take none. Every sequence attends as it would alone, forward and backward; what a call
asks for beyond that is refused by name.

Legend: N sequences, E width (embed_dim), H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyarch.dispatch import Verdict
from pyarch.dispatch import backend as running_on
from pyarch.nn.config import Config
from pyarch.nn.drop_in import backend_of
from pyarch.ops import attention_varlen
from pyarch.ops.attention import Settings
from pyarch.ops.attention_varlen_call import VARLEN_BACKWARD, VARLEN_FORWARD, describe


def is_jagged(tensor) -> bool:
    """Whether this is a nested tensor of torch's jagged layout."""
    return isinstance(tensor, Tensor) and tensor.is_nested and tensor.layout == torch.jagged


def as_jagged(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (tokens, E) as a nested tensor of the very sequences of another."""
    return torch.nested.nested_tensor_from_jagged(rows, like.offsets())


def attend_jagged(
    module: nn.MultiheadAttention,
    products,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Config,
    *,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    need_weights: bool = False,
    is_causal: bool = False,
) -> Tensor:
    """What a MultiheadAttention computes of jagged nested tensors.

    Args:
        module: its parameters are read now; of its methods none runs, nor do its hooks.
        products: makes query W_q^T, key W_k^T and value W_v^T of rows, each (tokens, H, D).
        query, key, value: (N, *, E), jagged; key and value of the same lengths.
        config: the window and the backend.
        masks: attn_mask and key_padding_mask.
        is_causal: whether token i of a sequence sees only tokens j <= i.

    Returns:
        (N, *, E) of the query's sequences.

    Raises:
        NotImplementedError: what sequences of unequal length do not have; the message names all of it.
    """
    refuse_jagged(module, (query, key, value), config, masks, need_weights=need_weights)
    rows = query.values()
    of_keys = rows if key is query else key.values()
    of_values = of_keys if value is key else value.values()
    with running_on(backend_of(config)):
        heads = attention_varlen(
            *products(module, rows, of_keys, of_values),
            query.offsets(),
            None if key is query else key.offsets(),
            is_causal=is_causal,
            scale=module.head_dim**-0.5,
            window=config.window,
        )
    return as_jagged(F.linear(heads.flatten(1), module.out_proj.weight, module.out_proj.bias), query)


def refuse_jagged(
    module: nn.MultiheadAttention,
    tensors: tuple[Tensor, Tensor, Tensor],
    config: Config,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    names: tuple[str, str, str] = ("query", "key", "value"),
    *,
    need_weights: bool = False,
    hint: str = "is_causal",
) -> None:
    """Raise NotImplementedError, naming all of it, for what `attend_jagged` does not compute.

    Args:
        module, config, masks, need_weights: as there.
        tensors: query, key and value.
        names: what the caller calls them.
        hint: and what its `is_causal`.
    """
    refusals = dict.fromkeys(_refusals(module, tensors, config, masks, names, need_weights, hint))
    if refusals:
        raise NotImplementedError(f"attention over jagged nested tensors: {'; '.join(refusals)}")


def _refusals(module, tensors, config: Config, masks, names, need_weights: bool, hint: str) -> Iterator[str]:
    if not all(is_jagged(each) for each in tensors):
        *first, last = dict.fromkeys(names)
        yield f"{', '.join(first)} and {last} must all be jagged" if first else f"{last} must be jagged"
        return
    widths = module.embed_dim, module.kdim, module.vdim
    for name, tensor, width in zip(names, tensors, widths, strict=True):
        if tensor.dim() != 3 or tensor._ragged_idx != 1 or tensor.shape[2] != width:
            yield f"{name} must be (sequences, tokens of each, {width}), got {tuple(tensor.shape)}"
        elif tensor.lengths() is not None:
            yield f"{name} has gaps between its sequences, make it contiguous"
    query, key, value = (each.offsets() for each in tensors)
    if query.shape != key.shape:
        yield f"{query.shape[0] - 1} sequences in {names[0]} and {key.shape[0] - 1} in {names[1]}"
    if key is not value and not torch.equal(key, value):
        yield f"{names[1]} and {names[2]} must have the same lengths"
    if not module.batch_first:
        yield "needs batch_first=True"
    if need_weights:
        yield "need_weights=True, needs need_weights=False"
    if any(mask is not None for mask in masks):
        yield f"masks, give what they hide by {hint} or a window, or pad the tensors"
    if module.bias_k is not None or module.add_zero_attn:
        yield "add_bias_kv or add_zero_attn"
    if module.training and module.dropout:
        yield f"dropout {module.dropout} in training, needs dropout 0"
    if config.window_dilation != 1 or (config.has_pattern and config.global_tokens):
        yield "a dilated window or global tokens"


def explain_jagged(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: Config,
    is_causal: bool = False,
) -> dict[str, tuple[Verdict, ...]]:
    """What each backend says of such a call with no masks or weights, for "forward" and "backward".

    Raises:
        NotImplementedError: as the call itself.
    """
    refuse_jagged(module, (query, key, value), config)
    device, dtype = query.device, query.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    element = torch.empty(1, 1, 1, dtype=dtype, device=device)

    def heads(tensor: Tensor) -> Tensor:
        return element.expand(tensor.values().shape[0], module.num_heads, module.head_dim)

    left, right = config.window or (None, None)
    settings = Settings(module.head_dim**-0.5, is_causal, left, right)
    call = describe(heads(query), heads(key), heads(value), query.offsets(), None, settings, False, True)
    return {"forward": VARLEN_FORWARD.explain(call), "backward": VARLEN_BACKWARD.explain(call)}

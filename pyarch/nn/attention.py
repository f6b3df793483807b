"""MultiheadAttention on pyarch's kernels.

    output = concat_h(softmax(q_h k_h^T / sqrt(D) + mask) v_h) W_out^T,  q_h = h-th part of query W_q^T
    (Vaswani et al., 2017, arXiv:1706.03762)

Constructor, parameters, state_dict, repr, errors and results are torch's, and there are a window, its
dilation and global tokens beside. The products before and after attention are torch's; heads are views of
them. A good call is recognised by types, shapes and dtypes; every other one, and what the kernels do not
carry (float64, strided nested tensors, torch.jit.trace), goes to torch's own forward, which computes it or
raises in its own words. Jagged nested tensors, which torch does not take, attend without padding.

Two things differ from torch: a query that sees no key gives zeros before out_proj, and dropout draws from a
random stream of its own.

Legend: N batch, H heads, L queries, S keys, E width (embed_dim), D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyarch.dispatch import Verdict
from pyarch.nn.attention_call import (
    Call,
    is_fused_by_torch,
    read,
    settings_of,
    warn_of_two_kinds,
    with_pattern,
)
from pyarch.nn.config import Config
from pyarch.nn.drop_in import DropIn, backend_of, config_of, left_to_torch
from pyarch.nn.jagged import attend_jagged, explain_jagged, is_jagged
from pyarch.ops import attention


class MultiheadAttention(DropIn, nn.MultiheadAttention):
    __doc__ = (
        nn.MultiheadAttention.__doc__
        + """
    pyarch adds, as keywords alone:

    Args:
        window: (left, right), how many keys a query sees before and after its own, None for all of that side;
            one number for both sides. It holds beside every mask. Default: no window.
        window_dilation: the distance between the keys of a window. Default: 1.
        global_tokens: the first so many tokens see every token and are seen by every token. Default: 0.

    Raises:
        ValueError: a window beside ``add_bias_kv`` or ``add_zero_attn``, whose keys have no position.
    """
    )

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
        *,
        window=None,
        window_dilation=1,
        global_tokens=0,
    ) -> None:
        self._keep_options(window=window, window_dilation=window_dilation, global_tokens=global_tokens)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        _check_positions(self, self.pyarch_config)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_jagged(query):
            wishes = {"masks": (attn_mask, key_padding_mask), "need_weights": need_weights}
            config = config_of(self)
            return over_jagged(self, query, key, value, config, is_causal=is_causal, **wishes), None
        is_fused = is_fused_by_torch(self, query, key, value, key_padding_mask, attn_mask)
        call = read(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal and not is_fused
        )
        config = config_of(self)
        if call is None:
            if config.has_pattern:
                hinted = is_causal and not is_fused
                attn_mask = with_pattern(attn_mask, hinted, config, query, key, self.batch_first)
                is_causal = False
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        warn_of_two_kinds(key_padding_mask, attn_mask, "key_padding_mask", "attn_mask")
        wanted = ("mean" if average_attn_weights else "heads") if need_weights else None
        # torch's steps give a result that lies sequence first; its users may view it so.
        moved = self.batch_first and query.dim() == 3 and not is_fused
        output, weights = attend(
            self, query, key, value, call, config, backend_of(config), wanted, sequence_first=moved
        )
        return output.transpose(0, 1) if moved else output, weights

    def explain(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ) -> dict[str, tuple[Verdict, ...]]:
        """What each backend says of a call, for "forward" and "backward".

        Of jagged nested tensors masks and `need_weights`, which the call refuses, are not judged.
        """
        if is_jagged(query):
            return explain_jagged(self, query, key, value, config_of(self), is_causal)
        is_fused = is_fused_by_torch(self, query, key, value, key_padding_mask, attn_mask)
        call = read(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal and not is_fused
        )
        return explain_attend(self, query, call, config_of(self))


# -------------------------------------------------------------------------------- any MultiheadAttention


def attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    config: Config,
    backend: str,
    return_weights: str | None = None,
    *,
    sequence_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What a MultiheadAttention, torch's or ours, computes of a call that `read` accepted.

    Args:
        module: its parameters are read now; of its methods none runs, nor do its hooks.
        query, key, value: as the module takes them; those that are one tensor share a product.
        call: from `read`, of tensors of these sizes.
        config: the window.
        backend: "auto" or a backend's name.
        return_weights: None, "mean" (N, L, S) or "heads" (N, H, L, S), after dropout.
        sequence_first: give (L, N, E) although the module is batch_first.

    Returns:
        The output in the shape of query, and the weights or None; without N where the call has none.
    """
    _check_positions(module, config)
    settings = settings_of(
        config, module.head_dim**-0.5, call.is_causal, module.dropout if module.training else 0.0
    )
    wishes = call, settings, backend, return_weights
    if query.dim() == 3:
        return _attend(module, query, key, value, *wishes, module.batch_first, sequence_first)
    output, weights = _attend(module, *_unsqueezed(query, key, value), *wishes, True, False)
    return output.squeeze(0), None if weights is None else weights.squeeze(0)


def over_jagged(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, config: Config, **wishes
) -> Tensor:
    """`attend_jagged` with the module's own products."""
    return attend_jagged(module, _products, query, key, value, config, **wishes)


def _attend(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: Call,
    settings: attention.Settings,
    backend: str,
    return_weights: str | None,
    batch_first: bool,
    sequence_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """`attend` of batched tensors, the batch first or second."""
    queries, keys, values = (_as_heads(each, batch_first) for each in _products(module, query, key, value))
    more = further_keys(module)
    if more:
        call = _over_all_keys(module, call)
        keys = _lengthened(keys, module.bias_k, more)
        values = _lengthened(values, module.bias_v, more)
    result = attention.attend(
        queries,
        keys,
        values,
        _extras(call, queries, settings),
        settings,
        return_weights=return_weights,
        backend=backend,
    )
    heads, weights = (result, None) if return_weights is None else result
    by_sequence = heads.permute(2, 0, 1, 3) if sequence_first or not batch_first else heads.transpose(1, 2)
    return F.linear(by_sequence.flatten(2), module.out_proj.weight, module.out_proj.bias), weights


def _unsqueezed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three with a batch of one in front; those that were one tensor still are."""
    queries = query.unsqueeze(0)
    keys = queries if key is query else key.unsqueeze(0)
    return queries, keys, keys if value is key else value.unsqueeze(0)


def _products(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """query W_q^T, key W_k^T and value W_v^T with their biases, each (*, *, H, D).

    They are views of as few products as there are different inputs.
    """
    # One reading: what a parametrization computes may change from one to the next.
    weight, bias, width = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    if weight is None:
        inputs, parts = (query, key, value), (1, 1, 1)
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    else:
        if query is key and key is value:
            inputs, parts = (query,), (3,)
        elif key is value:
            inputs, parts = (query, key), (1, 2)
        else:
            inputs, parts = (query, key, value), (1, 1, 1)
        weights = _split(weight, parts, width)
    biases = [None] * len(parts) if bias is None else _split(bias, parts, width)
    products = []
    for given, rows, added, count in zip(inputs, weights, biases, parts, strict=True):
        products += F.linear(given, rows, added).unflatten(-1, (count, module.num_heads, -1)).unbind(-3)
    return products


def _split(packed: Tensor, parts: tuple[int, ...], width: int) -> tuple[Tensor, ...]:
    """The rows of a packed weight or bias for each input, `parts` times `width` of them."""
    return (packed,) if len(parts) == 1 else packed.split([count * width for count in parts])


def _as_heads(rows: Tensor, batch_first: bool) -> Tensor:
    """Rows (N, L, H, D) or (L, N, H, D) as (N, H, L, D), a view."""
    return rows.transpose(1, 2) if batch_first else rows.permute(1, 2, 0, 3)


def _over_all_keys(module: nn.MultiheadAttention, call: Call) -> Call:
    """The call with the keys of add_bias_kv and add_zero_attn behind the others; no mask hides them."""
    beside = (0, further_keys(module))
    return call._replace(
        keys=call.keys + beside[1],
        mask=None if call.mask is None else F.pad(call.mask, beside, value=True),
        bias=None if call.bias is None else F.pad(call.bias, beside),
        padding=None if call.padding is None else F.pad(call.padding, beside, value=False),
    )


def further_keys(module: nn.MultiheadAttention) -> int:
    """How many keys the module adds to those of a call."""
    return (module.bias_k is not None) + bool(module.add_zero_attn)


def _lengthened(heads: Tensor, learned: Tensor | None, more: int) -> Tensor:
    """Keys or values (N, H, S, D) with a learned row (1, 1, E), if there is one, and zeros up to S + more."""
    batch, count, _, width = heads.shape
    rows = [heads]
    if learned is not None:
        row = learned.to(heads.dtype).view(1, count, 1, width)
        rows.append(row.expand(batch, -1, -1, -1))
    if len(rows) <= more:
        rows.append(heads.new_zeros(batch, count, 1, width))
    return torch.cat(rows, 2)


def _extras(call: Call, queries: Tensor, settings: attention.Settings) -> attention.Extras:
    seed = attention.draw_seed(settings, queries.device)
    if seed is call.mask is call.bias is call.padding is None:
        return attention.NO_EXTRAS
    return attention.Extras(mask=call.mask, bias=call.bias, padding=call.padding, seed=seed)


def _check_positions(module: nn.MultiheadAttention, config: Config) -> None:
    if config.has_pattern and further_keys(module):
        raise ValueError(
            "a window needs keys that have positions: those of add_bias_kv and add_zero_attn have none"
        )


# -------------------------------------------------------------------------------- which backend


def explain_attend(
    module: nn.MultiheadAttention, query, call: Call | None, config: Config
) -> dict[str, tuple[Verdict, ...]]:
    """What each backend says of a call that `read` read (None: torch answers it), without computing it."""
    if call is None:
        return left_to_torch(described(query))
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    call = _over_all_keys(module, call)
    element = torch.empty(1, 1, 1, 1, dtype=dtype, device=query.device)
    queries = element.expand(call.batch, module.num_heads, call.queries, module.head_dim)
    keys = element.expand(call.batch, module.num_heads, call.keys, module.head_dim)
    dropout_p = module.dropout if module.training else 0.0
    settings = settings_of(config, module.head_dim**-0.5, call.is_causal, dropout_p)
    # Any seed will do, and drawing one would be noticed.
    seed = torch.zeros((), dtype=torch.int64, device=query.device) if 0 < dropout_p < 1 else None
    extras = attention.Extras(mask=call.mask, bias=call.bias, padding=call.padding, seed=seed)
    return attention.explain(queries, keys, keys, extras, settings)


def described(input) -> str:
    """An input that torch answers, in words."""
    if not isinstance(input, Tensor):
        return type(input).__name__
    return "nested input" if input.is_nested else f"{input.dtype} input {tuple(input.shape)}"

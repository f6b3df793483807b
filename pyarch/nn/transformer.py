"""TransformerEncoderLayer and TransformerDecoderLayer whose attention runs on pyarch's kernels.

    x = norm1(x + attention(x)),  x = norm2(x + W_2 relu(W_1 x))      or, norm_first,
    x = x + attention(norm1(x)),  x = x + W_2 relu(W_1 norm2(x))
    (Vaswani et al., 2017, arXiv:1706.03762; norm first: Xiong et al., 2020, arXiv:2002.04745)

Constructor, parameters, state_dict, repr, errors and results are torch's, and there are a window, its
dilation and global tokens for the attention of the sequence to itself. The formulas run step by step in
training and in evaluation: torch's fused operator for evaluation, which reads the parameters past all
submodules, is not used. Attention passes by the forward of `self_attn`, whether that was swapped or not; the
module itself is called where somebody could notice: where it has hooks or another forward. The hint
`is_causal` is believed.

Nested tensors, which torch's TransformerEncoder makes of padded ones in evaluation, are computed as rows
without padding, but for attention, which gets them padded; the result is nested again. Where torch takes none
(in training, with gradients, beside masks) its own forward raises. So do all other calls that are not good
ones, and what the kernels do not carry is computed there. Jagged nested tensors, which torch's layers take
nowhere, are computed as rows throughout, with gradients too; a decoder's memory has lengths of its own.

Legend: N batch, L sequence, M memory, E width (d_model).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from pyarch.dispatch import Verdict
from pyarch.dispatch import backend as running_on
from pyarch.nn.attention import MultiheadAttention, attend, described, explain_attend, over_jagged
from pyarch.nn.attention_call import Call, read, warn_of_two_kinds, with_pattern
from pyarch.nn.config import DEFAULT, Config
from pyarch.nn.drop_in import CONFIG_ATTRIBUTE, DropIn, backend_of, config_of, left_to_torch
from pyarch.nn.jagged import as_jagged, explain_jagged, is_jagged, refuse_jagged

_OPTIONS_TEXT = """
    pyarch adds, as keywords alone and for ``self_attn``:

    Args:
        window: (left, right), how many tokens a token sees before and after itself, None for all of that
            side; one number for both sides. It holds beside every mask. Default: no window.
        window_dilation: the distance between the tokens of a window. Default: 1.
        global_tokens: the first so many tokens see every token and are seen by every token. Default: 0.
    """


class _TransformerDropIn(DropIn):
    """What both layers share."""

    def _adopt(self, *attentions: nn.MultiheadAttention) -> None:
        """Make the attention modules of a layer just built ours, the first with the layer's options."""
        for module in attentions:
            module.__class__ = MultiheadAttention
        if self.has_own_options:
            vars(attentions[0])[CONFIG_ATTRIBUTE] = vars(self)[CONFIG_ATTRIBUTE]

    def _attended(
        self,
        module: nn.MultiheadAttention,
        query: Tensor,
        memory: Tensor,
        call: Call,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """The output of one attention; `call` is what `padding`, `mask` and `is_causal` say."""
        config = _attention_config(self, module)
        if can_be_passed_by(module):
            return attend(module, query, memory, memory, call, config, backend_of(config))[0]
        if config.has_pattern and not config_of(module).has_pattern:
            # The module by itself does not know the layer's window.
            mask, is_causal = with_pattern(mask, is_causal, config, query, memory, module.batch_first), False
        masks = {"key_padding_mask": padding, "attn_mask": mask, "is_causal": is_causal}
        if config.backend == "auto":
            return module(query, memory, memory, need_weights=False, **masks)[0]
        with running_on(backend_of(config)):
            return module(query, memory, memory, need_weights=False, **masks)[0]

    def _attended_rows(
        self,
        module: nn.MultiheadAttention,
        rows: Tensor,
        like: Tensor,
        memory: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """The same for rows (tokens, E) of the sequences of a jagged tensor; None: they attend to themselves.

        There are no masks.
        """
        config = _attention_config(self, module)
        query = as_jagged(rows, like)
        key = query if memory is None else memory
        if can_be_passed_by(module):
            return over_jagged(module, query, key, key, config, is_causal=is_causal).values()
        with running_on(backend_of(config)):
            return module(query, key, key, need_weights=False, is_causal=is_causal)[0].values()

    def _may_overwrite(self, *attentions: nn.MultiheadAttention) -> bool:
        """Whether nobody can notice that sums and activations are computed in place."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        parts = [self.linear1, self.linear2, self.dropout, self.dropout1, self.dropout2]
        return all(type(part) in (nn.Linear, nn.Dropout) and not has_hooks(part) for part in parts) and all(
            map(can_be_passed_by, attentions)
        )

    def _fed_forward(self, x: Tensor, overwrite: bool) -> Tensor:
        if not overwrite or not (self.activation is F.relu or self.activation is F.gelu):
            return self._ff_block(x)
        activate_ = torch.relu_ if self.activation is F.relu else torch.ops.aten.gelu_
        hidden = self.dropout(activate_(self.linear1(x)))
        last = self.dropout3 if isinstance(self, nn.TransformerDecoderLayer) else self.dropout2
        return last(self.linear2(hidden))


class TransformerEncoderLayer(_TransformerDropIn, nn.TransformerEncoderLayer):
    __doc__ = nn.TransformerEncoderLayer.__doc__ + _OPTIONS_TEXT

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        window=None,
        window_dilation=1,
        global_tokens=0,
    ) -> None:
        self._keep_options(window=window, window_dilation=window_dilation, global_tokens=global_tokens)
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        self._adopt(self.self_attn)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if is_jagged(src):
            return self._over_jagged(src, (src_mask, src_key_padding_mask), is_causal)
        ragged = _read_ragged(self, src, src_mask, src_key_padding_mask)
        if ragged is not None:
            return self._over_rows(src, ragged)
        call = _read_self(self, src, src_mask, src_key_padding_mask, is_causal)
        if call is None:
            config = _attention_config(self, self.self_attn)
            if config.has_pattern:
                batch_first = self.self_attn.batch_first
                src_mask = with_pattern(src_mask, is_causal, config, src, src, batch_first)
                is_causal = False
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        warn_of_two_kinds(src_key_padding_mask, src_mask, "src_key_padding_mask", "src_mask")

        def attended(x: Tensor) -> Tensor:
            return self._attended(self.self_attn, x, x, call, src_key_padding_mask, src_mask, is_causal)

        return self._steps(src, attended)

    def _over_jagged(
        self, src: Tensor, masks: tuple[Tensor | None, Tensor | None], is_causal: bool
    ) -> Tensor:
        """The layer over a jagged nested tensor, all of it on rows without padding."""
        _refuse_jagged(self, self.self_attn, (src, src, src), masks, ("src",) * 3, "is_causal")

        def attended(rows: Tensor) -> Tensor:
            return self._attended_rows(self.self_attn, rows, src, None, is_causal)

        return as_jagged(self._steps(src.values(), attended), src)

    def _over_rows(self, src: Tensor, ragged: _Ragged) -> Tensor:
        """The layer over a nested tensor, on its rows without padding."""

        def attended(rows: Tensor) -> Tensor:
            padded = rows.new_zeros(ragged.call.batch * ragged.call.queries, rows.shape[-1])
            padded = padded.index_copy_(0, ragged.places, rows)
            padded = padded.unflatten(0, (ragged.call.batch, ragged.call.queries))
            padding = ragged.call.padding
            result = self._attended(self.self_attn, padded, padded, ragged.call, padding, None, False)
            return result.flatten(0, 1).index_select(0, ragged.places)

        rows = self._steps(src.values().unflatten(0, (-1, self.self_attn.embed_dim)), attended)
        return torch._nested_view_from_buffer(rows.flatten(), *_shape_of_nested(src))

    def _steps(self, x: Tensor, attended: Callable[[Tensor], Tensor]) -> Tensor:
        overwrite = self._may_overwrite(self.self_attn)
        if self.norm_first:
            x = _sum(x, self.dropout1(attended(self.norm1(x))), overwrite)
            return _sum(x, self._fed_forward(self.norm2(x), overwrite), overwrite)
        x = self.norm1(_sum(x, self.dropout1(attended(x)), overwrite))
        return self.norm2(_sum(x, self._fed_forward(x, overwrite), overwrite))

    def explain(
        self, src, src_mask=None, src_key_padding_mask=None, is_causal=False
    ) -> dict[str, tuple[Verdict, ...]]:
        """What each backend says of the attention of a call, for "forward" and "backward"."""
        if is_jagged(src):
            masks = src_mask, src_key_padding_mask
            _refuse_jagged(self, self.self_attn, (src, src, src), masks, ("src",) * 3, "is_causal")
            return explain_jagged(
                self.self_attn, src, src, src, _attention_config(self, self.self_attn), is_causal
            )
        ragged = _read_ragged(self, src, src_mask, src_key_padding_mask)
        if ragged is not None:
            like, call = src.values(), ragged.call
        else:
            like, call = src, _read_self(self, src, src_mask, src_key_padding_mask, is_causal)
        return explain_attend(self.self_attn, like, call, _attention_config(self, self.self_attn))


class TransformerDecoderLayer(_TransformerDropIn, nn.TransformerDecoderLayer):
    __doc__ = nn.TransformerDecoderLayer.__doc__ + _OPTIONS_TEXT

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        window=None,
        window_dilation=1,
        global_tokens=0,
    ) -> None:
        self._keep_options(window=window, window_dilation=window_dilation, global_tokens=global_tokens)
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        self._adopt(self.self_attn, self.multihead_attn)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if is_jagged(tgt) or is_jagged(memory):
            masks = (tgt_mask, tgt_key_padding_mask), (memory_mask, memory_key_padding_mask)
            return self._over_jagged(tgt, memory, masks, tgt_is_causal, memory_is_causal)
        to_itself = _read_self(self, tgt, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        to_memory = _read_memory(self, tgt, memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        if to_itself is None or to_memory is None:
            config = _attention_config(self, self.self_attn)
            if config.has_pattern:
                batch_first = self.self_attn.batch_first
                tgt_mask = with_pattern(tgt_mask, tgt_is_causal, config, tgt, tgt, batch_first)
                tgt_is_causal = False
            masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
            return super().forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal)

        def attended(x: Tensor) -> Tensor:
            masks = tgt_key_padding_mask, tgt_mask
            _warn_if_passed_by(self.self_attn, *masks)
            return self._attended(self.self_attn, x, x, to_itself, *masks, tgt_is_causal)

        def attended_memory(x: Tensor) -> Tensor:
            module, masks = self.multihead_attn, (memory_key_padding_mask, memory_mask)
            _warn_if_passed_by(module, *masks)
            return self._attended(module, x, memory, to_memory, *masks, memory_is_causal)

        return self._steps(tgt, attended, attended_memory)

    def _over_jagged(
        self,
        tgt: Tensor,
        memory: Tensor,
        masks: tuple[tuple[Tensor | None, Tensor | None], ...],
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> Tensor:
        """The layer over jagged nested tensors of as many sequences, all of it on rows without padding."""
        self._refuse_jagged_call(tgt, memory, masks)

        def attended(rows: Tensor) -> Tensor:
            return self._attended_rows(self.self_attn, rows, tgt, None, tgt_is_causal)

        def attended_memory(rows: Tensor) -> Tensor:
            return self._attended_rows(self.multihead_attn, rows, tgt, memory, memory_is_causal)

        return as_jagged(self._steps(tgt.values(), attended, attended_memory), tgt)

    def _refuse_jagged_call(
        self, tgt: Tensor, memory: Tensor, masks: tuple[tuple[Tensor | None, Tensor | None], ...]
    ) -> None:
        """Raise NotImplementedError for what either attention does not compute; masks as `_over_jagged`."""
        of_memory = tgt, memory, memory
        named = ("tgt",) * 3, ("tgt", "memory", "memory")
        _refuse_jagged(self, self.multihead_attn, of_memory, masks[1], named[1], "memory_is_causal")
        _refuse_jagged(self, self.self_attn, (tgt, tgt, tgt), masks[0], named[0], "tgt_is_causal")

    def _steps(
        self, x: Tensor, attended: Callable[[Tensor], Tensor], attended_memory: Callable[[Tensor], Tensor]
    ) -> Tensor:
        overwrite = self._may_overwrite(self.self_attn, self.multihead_attn)
        if self.norm_first:
            x = _sum(x, self.dropout1(attended(self.norm1(x))), overwrite)
            x = _sum(x, self.dropout2(attended_memory(self.norm2(x))), overwrite)
            return _sum(x, self._fed_forward(self.norm3(x), overwrite), overwrite)
        x = self.norm1(_sum(x, self.dropout1(attended(x)), overwrite))
        x = self.norm2(_sum(x, self.dropout2(attended_memory(x)), overwrite))
        return self.norm3(_sum(x, self._fed_forward(x, overwrite), overwrite))

    def explain(
        self,
        tgt,
        memory,
        tgt_mask=None,
        memory_mask=None,
        tgt_key_padding_mask=None,
        memory_key_padding_mask=None,
        tgt_is_causal=False,
        memory_is_causal=False,
    ) -> dict[str, tuple[Verdict, ...]]:
        """What each backend says of both attentions of a call.

        "forward" and "backward" are of the sequence to itself, "forward, memory" and "backward, memory" of
        the sequence to the memory.
        """
        module, of_itself = self.multihead_attn, _attention_config(self, self.self_attn)
        of_memory = _attention_config(self, module)
        if is_jagged(tgt) or is_jagged(memory):
            masks = (tgt_mask, tgt_key_padding_mask), (memory_mask, memory_key_padding_mask)
            self._refuse_jagged_call(tgt, memory, masks)
            itself = explain_jagged(self.self_attn, tgt, tgt, tgt, of_itself, tgt_is_causal)
            beside = explain_jagged(module, tgt, memory, memory, of_memory, memory_is_causal)
            return itself | _of_memory(beside)
        to_itself = _read_self(self, tgt, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        to_memory = _read_memory(self, tgt, memory, memory_mask, memory_key_padding_mask, memory_is_causal)
        if to_itself is None or to_memory is None:
            return left_to_torch(described(tgt))
        itself = explain_attend(self.self_attn, tgt, to_itself, of_itself)
        return itself | _of_memory(explain_attend(module, tgt, to_memory, of_memory))


def _of_memory(verdicts: dict[str, tuple[Verdict, ...]]) -> dict[str, tuple[Verdict, ...]]:
    return {f"{operation}, memory": each for operation, each in verdicts.items()}


# -------------------------------------------------------------------------------- reading a call


def _attention_config(layer: nn.Module, module: nn.MultiheadAttention) -> Config:
    """How one of a layer's attentions runs: as its own Config says, or else the layer's.

    The layer's window is for its self-attention alone.
    """
    own, config = config_of(module), config_of(layer)
    if own is not DEFAULT:
        return own
    return config if module is layer.self_attn or config is DEFAULT else Config(backend=config.backend)


def _refuse_jagged(layer: nn.Module, module: nn.MultiheadAttention, tensors, masks, names, hint) -> None:
    """Raise NotImplementedError for what one of a layer's attentions does not compute of jagged tensors."""
    config = _attention_config(layer, module)
    refuse_jagged(module, tensors, config, masks, names, hint=hint)
    if not can_be_passed_by(module) and config.window != config_of(module).window:
        raise NotImplementedError(
            "attention over jagged nested tensors: the window of a layer whose attention is called by itself "
            "for hooks or another forward, and does not know it; give the attention's name the window too"
        )


class _Ragged(NamedTuple):
    """A nested tensor (N, *, E): its padded call, and where its rows stand among the N * L padded ones."""

    call: Call
    places: Tensor


def _read_self(
    layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, x: Tensor, mask, padding, is_causal: bool
) -> Call | None:
    """The self-attention of a call, or None where torch's own forward answers it."""
    return read(layer.self_attn, x, x, x, padding, False, mask, is_causal)


def _read_memory(
    layer: nn.TransformerDecoderLayer, x: Tensor, memory: Tensor, mask, padding, is_causal: bool
) -> Call | None:
    return read(layer.multihead_attn, x, memory, memory, padding, False, mask, is_causal)


def _read_ragged(layer: nn.TransformerEncoderLayer, src, mask, padding) -> _Ragged | None:
    """A call with a nested tensor that torch's own forward would answer, else None."""
    if not isinstance(src, Tensor) or not src.is_nested or src.layout != torch.strided:
        return None
    if mask is not None or padding is not None or layer.training or not layer.self_attn.batch_first:
        return None
    if not src.is_contiguous() or src.dim() != 3 or torch.compiler.is_compiling():
        return None
    sizes = src._nested_tensor_size()
    width = layer.self_attn.embed_dim
    if len(sizes) == 0 or not bool((sizes[:, 1] == width).all()):
        return None
    rows = src.values().unflatten(0, (-1, width))
    if torch.is_grad_enabled() and (
        src.requires_grad or any(each.requires_grad for each in layer.parameters())
    ):
        return None
    if read(layer.self_attn, rows, rows, rows, None, False) is None:
        return None
    longest = int(sizes[:, 0].max())
    present = (torch.arange(longest) < sizes[:, :1]).to(src.device)
    call = Call(len(sizes), longest, longest, padding=present.logical_not())
    return _Ragged(call, present.flatten().nonzero().squeeze(1))


def _shape_of_nested(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes, strides and offsets, which with a buffer make a nested tensor."""
    return (
        tensor._nested_tensor_size(),
        tensor._nested_tensor_strides(),
        tensor._nested_tensor_storage_offsets(),
    )


# -------------------------------------------------------------------------------- what others could notice

# Step by step torch calls the modules, so their hooks run and a forward of their own counts.
KNOWN_FORWARDS = (nn.MultiheadAttention.forward, MultiheadAttention.forward)


def can_be_passed_by(module: nn.MultiheadAttention) -> bool:
    """Whether calling the module means no more than computing what torch's class does."""
    return (
        type(module).forward in KNOWN_FORWARDS
        and "forward" not in vars(module)
        and not has_hooks(module)
        and not _has_any_global_hook()
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs anything beside its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _warn_if_passed_by(module: nn.MultiheadAttention, padding, mask) -> None:
    """The warning that the module would give if it were called."""
    if can_be_passed_by(module):
        warn_of_two_kinds(padding, mask, "key_padding_mask", "attn_mask")


# -------------------------------------------------------------------------------- sums


def _sum(x: Tensor, change: Tensor, overwrite: bool) -> Tensor:
    """x + change, in the memory of the change where that is allowed and holds it."""
    if overwrite and change.dtype == x.dtype:
        return change.add_(x)
    return x + change

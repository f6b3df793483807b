"""Modules of whole models that attention is timed in, stock and ours with the same parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pyarch.integrations.transformers
from benchmarks.attention_cases import (
    MAPS,
    MISTRAL,
    SWIN,
    SWIN_WINDOWS,
    WEIGHTS,
    WIDENING,
    AttentionCase,
)
from benchmarks.benchmark import DTYPES
from benchmarks.suites import Absent
from benchmarks.twins import twin_modules
from pyarch.models import swin


class MistralAttention(nn.Module):
    """The attention of Hugging Face's Mistral with its rotation and its mask, under an implementation."""

    def __init__(self, case: AttentionCase, implementation: str) -> None:
        super().__init__()
        try:
            from transformers import MistralConfig
            from transformers.masking_utils import create_sliding_window_causal_mask
            from transformers.models.mistral import modeling_mistral
        except ImportError as error:
            raise Absent(f"transformers: {error}") from error
        self.config = MistralConfig(
            hidden_size=case.width,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_head_count,
            head_dim=case.head_dim,
            sliding_window=case.window[0] + 1,
            max_position_embeddings=case.queries,
            attn_implementation=implementation,
        )
        self.make_mask = create_sliding_window_causal_mask
        self.attention = modeling_mistral.MistralAttention(self.config, layer_idx=0)
        self.rotary = modeling_mistral.MistralRotaryEmbedding(self.config)

    def forward(self, source: Tensor) -> Tensor:
        places = torch.arange(source.shape[1], device=source.device)[None]
        settings = {"config": self.config, "inputs_embeds": source, "position_ids": places}
        mask = self.make_mask(attention_mask=None, past_key_values=None, **settings)
        return self.attention(source, self.rotary(source, position_ids=places), mask)[0]


def block_twins(case: AttentionCase, device: str) -> tuple[nn.Module, nn.Module]:
    """The stock module of a case, and its twin on our kernels."""
    place = {"device": device, "dtype": DTYPES[case.dtype]}
    if case.form != MISTRAL:
        return twin_modules(lambda: make_module(case, place))
    stock = MistralAttention(case, "sdpa").to(**place)
    pyarch.integrations.transformers.register()
    ours = MistralAttention(case, "pyarch").to(**place)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def make_module(case: AttentionCase, place: dict) -> nn.Module:
    if case.form in (WEIGHTS, MAPS):
        return nn.MultiheadAttention(case.width, case.heads, batch_first=True, **place)
    if case.form == SWIN:
        side = round(case.queries**0.5)
        return swin.Layer(case.width, case.heads, side, side // 2).to(**place)
    # No dropout, so that training can be compared with float64.
    settings = {"dropout": 0.0, "batch_first": True}
    return nn.TransformerEncoderLayer(case.width, case.heads, WIDENING * case.width, **settings, **place)


def source_shape(case: AttentionCase) -> tuple[int, ...]:
    """What a module takes: (B, T, C), of a Swin an image (B, H, W, C)."""
    if case.form != SWIN:
        return case.batch, case.queries, case.width
    side = SWIN_WINDOWS * round(case.queries**0.5)
    return case.batch, side, side, case.width


def output_of(case: AttentionCase, module: nn.Module, source: Tensor) -> tuple[Tensor, ...]:
    """A module's output, and its weights where the case wants them."""
    if case.form not in (WEIGHTS, MAPS):
        return (module(source),)
    return module(source, source, source, average_attn_weights=case.form == WEIGHTS)

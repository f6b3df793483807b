"""Generating token by token: what each architecture keeps of the tokens so far, and one step with it.

A recurrent layer keeps its states, attention the keys and values of all tokens that the next one may see, a
convolution its last k samples. Stock layers attend by torch's scaled_dot_product_attention, swapped ones by
`pyarch.ops.attention_decode`; recurrent layers and convolutions are called as they are. For callers without
gradients.

Legend: B sequences, W width, H heads, D width of a head, k taps, S places for keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyarch.comparison.architectures import CausalAttention, CausalConvolution, Recurrent
from pyarch.nn.drop_in import DropIn
from pyarch.ops import attention_decode


class RecurrentState:
    """The layer's own states, whatever the number of tokens."""

    def __init__(self, module: Recurrent, length: int) -> None:
        self.layer = module.layer
        self.states = None

    def read(self, x: Tensor) -> None:
        """Take in the first tokens (B, T, W) at once."""
        self.states = self.layer(x)[1]

    def step(self, token: Tensor) -> Tensor:
        """The output (B, 1, W) of the next token (B, 1, W)."""
        output, self.states = self.layer(token, self.states)
        return output

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.states if isinstance(self.states, tuple) else (self.states,)


class AttentionState:
    """Keys and values (B, H, S, D) in a ring: the token at place p of the sequence lies at p % S.

    S is all that a token may see; beyond it the oldest gives way. The order of keys does not matter.
    """

    def __init__(self, module: CausalAttention, length: int) -> None:
        self.layer = module.layer
        self.places = length if module.before is None else min(module.before + 1, length)
        self.attend = _attend_on_kernels if isinstance(module.layer, DropIn) else _attend_by_torch
        self.seen = 0
        self.keys = self.values = None

    def read(self, x: Tensor) -> None:
        """Take in the first tokens (B, T, W) at once."""
        self.seen = x.shape[1]
        kept = range(max(self.seen - self.places, 0), self.seen)
        _, keys, values = self._products(x[:, kept.start :])
        places = torch.tensor([each % self.places for each in kept], device=x.device)
        self._make_room(x)
        self.keys[:, :, places] = keys
        self.values[:, :, places] = values

    def step(self, token: Tensor) -> Tensor:
        """The output (B, 1, W) of the next token (B, 1, W)."""
        query, key, value = self._products(token)
        if self.keys is None:
            self._make_room(token)
        place = self.seen % self.places
        self.keys[:, :, place : place + 1] = key
        self.values[:, :, place : place + 1] = value
        self.seen += 1
        heads = self.attend(query, self.keys, self.values, min(self.seen, self.places))  # (B, H, 1, D)
        out = self.layer.out_proj
        return F.linear(heads.transpose(1, 2).flatten(2), out.weight, out.bias)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values

    def _products(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (B, H, T, D) of tokens (B, T, W)."""
        packed = F.linear(x, self.layer.in_proj_weight, self.layer.in_proj_bias)
        return packed.unflatten(-1, (3, self.layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _make_room(self, x: Tensor) -> None:
        shape = x.shape[0], self.layer.num_heads, self.places, self.layer.head_dim
        self.keys, self.values = x.new_zeros(shape), x.new_zeros(shape)


class ConvolutionState:
    """The last k samples (B, W, k)."""

    def __init__(self, module: CausalConvolution, length: int) -> None:
        self.layer, self.mix = module.layer, module.mix
        self.kernel = module.layer.kernel_size[0]
        self.samples = None

    def read(self, x: Tensor) -> None:
        """Take in the first tokens (B, T, W) at once."""
        rows = x[:, -self.kernel :].transpose(1, 2)
        self.samples = F.pad(rows, (self.kernel - rows.shape[2], 0))

    def step(self, token: Tensor) -> Tensor:
        """The output (B, 1, W) of the next token (B, 1, W)."""
        if self.samples is None:
            self.samples = token.new_zeros(token.shape[0], token.shape[2], self.kernel)
        self.samples = torch.cat([self.samples[:, :, 1:], token.transpose(1, 2)], 2)
        return self.mix(self.layer(self.samples).transpose(1, 2))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.samples,)


State = RecurrentState | AttentionState | ConvolutionState
KEEPS: dict[type[nn.Module], Callable[[nn.Module, int], State]] = {
    Recurrent: RecurrentState,
    CausalAttention: AttentionState,
    CausalConvolution: ConvolutionState,
}


def state_for(module: nn.Module, length: int) -> State:
    """What a causal module of architectures.py, stock or swapped, keeps of `length` tokens; still empty."""
    return KEEPS[type(module)](module, length)


def _attend_by_torch(query: Tensor, keys: Tensor, values: Tensor, filled: int) -> Tensor:
    return F.scaled_dot_product_attention(query, keys[:, :, :filled], values[:, :, :filled])


def _attend_on_kernels(query: Tensor, keys: Tensor, values: Tensor, filled: int) -> Tensor:
    return attention_decode(query, keys, values, filled)

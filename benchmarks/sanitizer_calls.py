"""One small call of every Triton kernel in each of its forms, as data: what the sanitizer watches.

Sizes are ragged and small, because a sanitizer slows a kernel down ten- to a hundredfold. A test holds that
the calls reach every kernel that the compile audit builds.

Legend: N, C, L, H, W of convolutions; T, B, I, H of recurrent layers; B, H, T, D of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from pyarch.reference.attention import Extras, Settings
from pyarch.triton_kernels import attention, attention_decode, attention_varlen, conv, recurrent

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Drawing:
    """Where and in which dtype a call draws its tensors."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)


@dataclass(frozen=True)
class Conv:
    """Forward and backward of a depthwise convolution; `padding` on each side of every dimension."""

    input: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int = 1
    padding: int = 1
    multiplier: int = 1
    mode: str = "zeros"
    channels_last: bool = False
    transposed: bool = False

    def run(self, draw: Drawing) -> tuple[Tensor, ...]:
        dims, outputs = len(self.kernel), self.input[1] * self.multiplier
        x, weight, bias = draw(*self.input), draw(outputs, 1, *self.kernel), draw(outputs)
        if self.channels_last:
            x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
        if self.transposed:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        settings = [self.stride] * dims, [self.padding] * (2 * dims), [1] * dims, self.mode
        out = conv.forward(x, weight, bias, *settings, self.channels_last)
        grads = conv.backward(draw(*out.shape), x, weight, *settings, self.channels_last, (True,) * 3)
        return out, *grads


@dataclass(frozen=True)
class Recurrent:
    """Forward and backward of a layer by one path; `lengths`, falling, makes it packed."""

    mode: str
    path: str
    hidden: int = 20
    directions: int = 2
    lengths: tuple[int, ...] = ()
    proj: int = 0
    steps: int = 3
    batch: int = 3
    inputs: int = 5

    def run(self, draw: Drawing) -> tuple[Tensor | None, ...]:
        D, H, P, G = self.directions, self.hidden, self.proj or self.hidden, GATES[self.mode]
        batch, sizes, rows = self.batch, None, (self.steps, self.batch)
        if self.lengths:
            alive = [sum(length > t for length in self.lengths) for t in range(self.lengths[0])]
            batch, sizes, rows = len(self.lengths), torch.tensor(alive), (sum(alive),)
        weights = []
        for _ in range(D):
            weights += [draw(G * H, self.inputs), draw(G * H, P), draw(G * H), draw(G * H)]
            weights += [draw(P, H)] if self.proj else []
        lstm = self.mode == "lstm"
        states = draw(*rows, self.inputs), draw(D, batch, P), draw(D, batch, H) if lstm else None
        output, h_n, c_n, gates, cells = recurrent.forward(
            self.mode, *states, weights, sizes, True, self.path
        )
        incoming = draw(*output.shape), draw(*h_n.shape), draw(*c_n.shape) if lstm else None
        needs = True, True, lstm, *(True for _ in weights)
        of_states = recurrent.backward(
            self.mode, *incoming, *states, weights, sizes, output, gates, cells, needs, self.path
        )
        return output, h_n, c_n, *of_states[:3], *of_states[3]


@dataclass(frozen=True)
class Attention:
    """Forward, weights and backward of attention; `extras` names the tensors that are given."""

    queries: int = 20
    keys: int = 37
    dim: int = 24
    heads: int = 2
    kv_heads: int = 1
    settings: dict = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    weights: bool = False

    def drawn_extras(self, draw: Drawing) -> Extras:
        B, H, Tq, Tk = 1, self.heads, self.queries, self.keys

        def bools(*shape: int) -> Tensor:
            return torch.rand(shape, device=draw.device) < 0.3

        makers = {
            "mask": lambda: ~bools(B, 1, Tq, Tk),
            "bias": lambda: draw(1, H, Tq, Tk),
            "padding": lambda: bools(B, Tk),
            "global_mask": lambda: bools(B, Tk),
            "sinks": lambda: draw(H),
            "seed": lambda: torch.tensor(2**40 + 7, device=draw.device),
            "distance_bias": lambda: draw(1, H, Tq + Tk - 1),
        }
        return Extras(**{name: makers[name]() for name in self.extras})

    def run(self, draw: Drawing) -> tuple[Tensor | None, ...]:
        query, grad_out = (draw(1, self.heads, self.queries, self.dim) for _ in range(2))
        key, value = (draw(1, self.kv_heads, self.keys, self.dim) for _ in range(2))
        extras, settings = self.drawn_extras(draw), Settings(self.dim**-0.5, **self.settings)
        out, lse = attention.forward(query, key, value, extras, settings)
        given = extras.bias, extras.sinks, extras.distance_bias
        needs = True, True, True, *(each is not None for each in given)
        grads = attention.backward(
            grad_out, torch.randn_like(lse), query, key, value, out, lse, extras, settings, needs
        )
        of_heads = (
            [attention.weights(query, key, lse, extras, settings, mean) for mean in (False, True)]
            if self.weights
            else []
        )
        return out, *grads, *of_heads


@dataclass(frozen=True)
class Varlen:
    """Forward and backward of attention over sequences of unequal length, some of them empty."""

    lengths: tuple[tuple[int, int], ...] = ((5, 7), (0, 0), (18, 37), (0, 9), (4, 0))
    dim: int = 24
    settings: dict = field(default_factory=dict)
    sinks: bool = False
    at_end: bool = False

    def run(self, draw: Drawing) -> tuple[Tensor | None, ...]:
        ends = [[0, *accumulate(pair[side] for pair in self.lengths)] for side in (0, 1)]
        cu_q, cu_k = (torch.tensor(each, dtype=torch.int32, device=draw.device) for each in ends)
        query, grad_out = (draw(ends[0][-1], 2, self.dim) for _ in range(2))
        key, value = (draw(ends[1][-1], 1, self.dim) for _ in range(2))
        sinks, settings = draw(2) if self.sinks else None, Settings(self.dim**-0.5, **self.settings)
        out, lse = attention_varlen.forward(query, key, value, cu_q, cu_k, sinks, settings, self.at_end)
        needs = True, True, True, self.sinks
        grads = attention_varlen.backward(
            grad_out, None, query, key, value, out, lse, cu_q, cu_k, sinks, settings, self.at_end, needs
        )
        return out, *grads


@dataclass(frozen=True)
class Decode:
    """Attention of a few new queries on a cache."""

    positions: tuple[int, ...] = (150, 0, 63)
    queries: int = 1
    dim: int = 24
    settings: dict = field(default_factory=dict)
    sinks: bool = False

    def run(self, draw: Drawing) -> tuple[Tensor, ...]:
        batch, places = len(self.positions), 200
        query = draw(batch, 4, self.queries, self.dim)
        key, value = (draw(batch, 2, places, self.dim) for _ in range(2))
        positions = torch.tensor(self.positions, dtype=torch.int32, device=draw.device)
        settings = Settings(self.dim**-0.5, is_causal=True, **self.settings)
        return attention_decode.forward(
            query, key, value, positions, draw(4) if self.sinks else None, settings
        )


WINDOWED = dict(left=6, right=3, dropout_p=0.2, softcap=20.0)
CALLS: dict[str, Callable] = {
    "conv 1-D causal": Conv((2, 5, 40), (4,), padding=3),
    "conv 1-D long kernel": Conv((2, 3, 40), (31,), padding=15),
    "conv 1-D transposed": Conv((2, 16, 33), (3,), transposed=True),
    "conv 3x3": Conv((1, 3, 5, 13), (3, 3)),
    "conv 3x3 nhwc": Conv((1, 17, 3, 5), (3, 3), channels_last=True),
    "conv 3x3 stride 2": Conv((2, 3, 9, 13), (3, 3), stride=2),
    "conv 3x3 stride 2 nhwc": Conv((2, 16, 8, 9), (3, 3), stride=2, channels_last=True),
    "conv 1-D multiplier, circular": Conv((1, 2, 9), (3,), multiplier=2, mode="circular"),
    "conv 3x3 reflect nhwc": Conv((1, 8, 6, 7), (3, 3), mode="reflect", channels_last=True),
    "conv 7x7 small map": Conv((1, 2, 7, 7), (7, 7), padding=3),
    "conv 7x7 nhwc": Conv((1, 8, 9, 10), (7, 7), padding=3, channels_last=True),
    "conv 11x11": Conv((1, 1, 6, 8), (11, 11), padding=5),
    "conv 3x3x3": Conv((1, 3, 4, 5, 9), (3, 3, 3)),
    "conv 3x3x3 nhwc": Conv((1, 9, 3, 4, 5), (3, 3, 3), channels_last=True),
    "lstm resident": Recurrent("lstm", "resident"),
    "gru resident, packed": Recurrent("gru", "resident", lengths=(4, 2, 2, 1)),
    "rnn resident": Recurrent("rnn_tanh", "resident", directions=1),
    "lstm step, projected, packed": Recurrent("lstm", "step", lengths=(3, 2, 1), proj=9),
    "gru step": Recurrent("gru", "step"),
    "rnn step": Recurrent("rnn_relu", "step"),
    "lstm persistent": Recurrent("lstm", "persistent", directions=1),
    "gru persistent, packed": Recurrent("gru", "persistent", lengths=(4, 2, 2, 1)),
    "rnn persistent": Recurrent("rnn_tanh", "persistent", hidden=70, directions=1),
    "attention": Attention(),
    "attention causal, weights": Attention(settings=dict(is_causal=True), weights=True),
    "attention bias, window, padding, sinks": Attention(
        settings=WINDOWED, extras=("bias", "padding", "sinks", "seed"), weights=True
    ),
    "attention distances": Attention(settings=dict(softcap=3.0), extras=("distance_bias",), weights=True),
    "attention mask, global, dilation": Attention(
        settings=dict(left=3, right=2, dilation=3, global_tokens=2), extras=("mask", "global_mask")
    ),
    "attention 128 wide": Attention(queries=9, keys=33, dim=128),
    "sequences causal": Varlen(settings=dict(is_causal=True), at_end=True),
    "sequences window, sinks": Varlen(settings=dict(left=6, softcap=20.0), sinks=True),
    "decode": Decode(),
    "decode window, sinks": Decode(queries=3, settings=dict(left=30, softcap=9.0), sinks=True),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def watched(device: str, dtype: str) -> dict[str, Callable[[], tuple]]:
    """Each call by its name, ready to run."""
    draw = Drawing(torch.device(device), DTYPES[dtype])
    return {name: lambda call=call: call.run(draw) for name, call in CALLS.items()}

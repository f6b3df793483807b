"""The support matrix: what each backend says, through its refusals, of sample calls of every operator."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch

from benchmarks.markdown import markdown_table
from pyarch import hardware, native
from pyarch.dispatch import BACKENDS, Call, Op, Verdict
from pyarch.ops import attention, conv, recurrent
from pyarch.ops.attention_call import AttentionCall

# Each backend is asked about the device it is made for; the matrix must not depend on this machine's.
DEVICES = {
    "triton": ("cuda", "sm_90"),
    "cuda": ("cuda", "sm_90"),
    "cpu": ("cpu", "avx512"),
    "torch": ("cpu", "avx512"),
    "reference": ("cpu", "avx512"),
}

# Features of depthwise convolution as changes of one plain 2-D call.
CONV_FEATURES: dict[str, dict] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "1-D": {"sizes": (128,)},
    "2-D": {},
    "3-D": {"sizes": (16, 16, 16)},
    "channels_last": {"channels_last": True},
    "kernel 31": {"kernel": 31},
    "stride 2": {"stride": 2},
    "dilation 2": {"dilation": 2},
    "even kernel, padding 'same'": {"kernel": 4, "padding": (1, 2)},
    "padding_mode reflect": {"padding_mode": "reflect"},
    "padding_mode replicate": {"padding_mode": "replicate"},
    "padding_mode circular": {"padding_mode": "circular"},
    "depth multiplier 2": {"multiplier": 2},
}


def conv_call(
    device: str,
    architecture: str,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, ...] = (56, 56),
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    padding: tuple[int, int] = (1, 1),
    padding_mode: str = "zeros",
    channels_last: bool = False,
    multiplier: int = 1,
) -> conv.ConvCall:
    """The metadata of a call with batch 8 and 96 channels, every spatial dimension alike."""
    dimensions = len(sizes)
    return conv.ConvCall(
        device=device,
        architecture=architecture,
        dtype=dtype,
        input_shape=(8, 96, *sizes),
        weight_shape=(96 * multiplier, 1, *(kernel,) * dimensions),
        stride=(stride,) * dimensions,
        padding=padding * dimensions,
        dilation=(dilation,) * dimensions,
        padding_mode=padding_mode,
        channels_last=channels_last,
    )


# Features of a recurrent layer as changes of one plain LSTM call.
RECURRENT_FEATURES: dict[str, dict] = {
    "LSTM float32": {},
    "LSTM bfloat16": {"dtype": torch.bfloat16},
    "LSTM float16": {"dtype": torch.float16},
    "LSTM float64": {"dtype": torch.float64},
    "GRU": {"mode": "gru"},
    "RNN tanh": {"mode": "rnn_tanh"},
    "RNN relu": {"mode": "rnn_relu"},
    "cell (1 step)": {"steps": 1},
    "batch 1": {"batch": 1},
    "hidden size 1025, batch 129": {"hidden": 1025, "batch": 129},
    "bidirectional": {"directions": 2},
    "proj_size": {"proj": 64},
    "no biases": {"bias": False},
    "packed sequences": {"packed": True},
    "inference": {"save": False},
}


def recurrent_call(
    device: str,
    architecture: str,
    dtype: torch.dtype = torch.float32,
    mode: str = "lstm",
    steps: int = 128,
    batch: int = 16,
    hidden: int = 256,
    directions: int = 1,
    proj: int = 0,
    bias: bool = True,
    packed: bool = False,
    save: bool = True,
) -> recurrent.RecurrentCall:
    """The metadata of a layer's call with as many inputs as hidden units."""
    return recurrent.RecurrentCall(
        device=device,
        architecture=architecture,
        dtype=dtype,
        mode=mode,
        steps=steps,
        batch=batch,
        rows=steps * batch,
        input_size=hidden,
        hidden_size=hidden,
        proj_size=proj,
        directions=directions,
        bias=bias,
        packed=packed,
        save=save,
    )


# Features of attention as changes of one plain call.
ATTENTION_FEATURES: dict[str, dict] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "causal": {"is_causal": True},
    "window": {"left": 256, "right": 0},
    "dilated window": {"left": 64, "right": 64, "dilation": 2},
    "global tokens": {"left": 64, "right": 64, "global_tokens": 8},
    "global tokens by mask": {"left": 64, "right": 64, "global_mask": True},
    "one query of a long sequence": {"queries": 1, "query_offset": 1023},
    "bool mask": {"mask": True},
    "additive bias": {"bias": True},
    "learned bias": {"bias": True, "bias_grad": True},
    "bias by distance": {"distance_bias": True},
    "key padding": {"padding": True},
    "dropout": {"dropout": True},
    "softcap": {"softcap": True},
    "attention sinks": {"sinks": True},
    "grouped queries": {"kv_heads": 2},
    "value size 128": {"value_dim": 128},
    "head size 59": {"head_dim": 59, "value_dim": 59},
    "head size 512": {"head_dim": 512, "value_dim": 512},
    "inference": {"save": False},
}


def attention_call(device: str, architecture: str, **changes) -> AttentionCall:
    """The metadata of a call with batch 2, 8 heads of size 64, 1024 queries and keys, but for the changes."""
    plain = {"dtype": torch.float32, "batch": 2, "heads": 8, "kv_heads": 8, "queries": 1024, "keys": 1024}
    sizes = {"head_dim": 64, "value_dim": 64, "save": True}
    return AttentionCall(device=device, architecture=architecture, **plain | sizes | changes)


# Operator -> its passes, the features asked about, what builds a call from a device and a feature's changes.
OPERATORS: dict[str, tuple[dict[str, Op], dict[str, dict], Callable[..., Call]]] = {
    "depthwise_conv": (
        {"forward": conv.FORWARD, "backward": conv.BACKWARD},
        CONV_FEATURES,
        conv_call,
    ),
    "recurrent": (
        {"forward": recurrent.FORWARD, "backward": recurrent.BACKWARD},
        RECURRENT_FEATURES,
        recurrent_call,
    ),
    "attention": (
        {"forward": attention.FORWARD, "backward": attention.BACKWARD, "weights": attention.WEIGHTS},
        ATTENTION_FEATURES,
        attention_call,
    ),
}


def support_matrix() -> str:
    """Operators and features downward, backends across; what is refused is numbered and told below.

    It is asked as if everything were built and installed: what this machine lacks is told by `info`.
    """
    notes: dict[str, int] = {}
    built = patch.object(native, "serving", lambda: ("avx512", ""))
    installed = patch.object(hardware, "triton_version", lambda: "3.7")
    with built, installed:
        body = [
            [operator, feature, *(cell(passes, backend, build, changes, notes) for backend in BACKENDS)]
            for operator, (passes, features, build) in OPERATORS.items()
            for feature, changes in features.items()
        ]
    numbered = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n\n".join([markdown_table(["operator", "feature", *BACKENDS], body), "\n".join(numbered)])


def cell(passes: dict[str, Op], backend: str, build: Callable[..., Call], changes: dict, notes: dict) -> str:
    """What a backend answers, one answer where its passes agree; reasons become numbered notes."""
    call = build(*DEVICES[backend], **changes)
    verdicts = {
        name: verdict
        for name, op in passes.items()
        for verdict in op.explain(call)
        if verdict.backend == backend
    }
    answers = {name: answer(verdict, notes) for name, verdict in verdicts.items()}
    if len(set(answers.values())) == 1:
        return next(iter(answers.values()))
    return ", ".join(f"{name} {said}" for name, said in answers.items())


def answer(verdict: Verdict, notes: dict[str, int]) -> str:
    if verdict.accepts:
        return "yes"
    number = notes.setdefault(verdict.reason, len(notes) + 1)
    return f"{'no' if verdict.refusals else 'on request'} ({number})"

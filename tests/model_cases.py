"""What the tests of pyarch.models expect of each model, counted by hand, and how they find its layers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyarch import models, native

KERNELS = ("cpu", "reference")


@dataclass(frozen=True)
class Expected:
    """What is known of one model.

    Args:
        operator: what its layers compute.
        layers: how many there are to swap, at the real and at the tiny size.
        output: the shape of the tiny model's first output.
        learnt: the share of the first loss that forty steps of Adam leave, at most.
        rate: of the gradient descent whose loss curve is compared with and without pyarch: one at which the
            curve shows if a layer's weight stands still.
    """

    operator: str
    layers: tuple[int, int]
    output: tuple[int, ...]
    learnt: float = 0.75
    rate: float = 0.02


EXPECTED = {
    "convnext": Expected("depthwise_conv", (18, 2), (8, 4)),
    "mobilenet": Expected("depthwise_conv", (17, 3), (8, 4)),
    "aspp": Expected("depthwise_conv", (5, 4), (4, 4, 64, 64)),
    "conformer": Expected("depthwise_conv", (4, 4), (4, 75, 4), learnt=0.5),
    "mamba": Expected("depthwise_conv", (4, 1), (4, 33, 8)),
    "rnn_language": Expected("recurrent", (1, 1), (8, 12, 8), learnt=0.5),
    "gru_language": Expected("recurrent", (1, 1), (8, 12, 8), learnt=0.5, rate=0.2),
    "lstm_language": Expected("recurrent", (1, 1), (8, 12, 8), learnt=0.5, rate=1.0),
    "bilstm_classifier": Expected("recurrent", (1, 1), (16, 4), learnt=0.5, rate=0.2),
    "bilstm_tagger": Expected("recurrent", (1, 1), (16, 9, 4), learnt=0.5, rate=1.0),
    "seq2seq": Expected("recurrent", (2, 2), (16, 5, 8), learnt=0.6, rate=0.2),
    "crnn": Expected("recurrent", (2, 2), (8, 16, 4), learnt=0.5),
    "cnn_bilstm": Expected("recurrent", (1, 1), (9, 8, 5), rate=0.2),
    "encoder": Expected("attention", (4, 4), (32, 4), learnt=0.2),
    "gpt": Expected("attention", (4, 4), (8, 33, 8), learnt=0.3),
    "longformer": Expected("attention", (2, 2), (16, 24, 4), learnt=0.3),
}

STOCK = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)

NAMES = tuple(EXPECTED)
RECURRENT = tuple(name for name in NAMES if EXPECTED[name].operator == "recurrent")
ATTENTION = ("conformer", *(name for name in NAMES if EXPECTED[name].operator == "attention"))

# The ledger books each run under the operator of its model.
each_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.operator(EXPECTED[name].operator)) for name in NAMES]
)


def tiny(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(name, "tiny")


def trained(name: str, steps: int, rate: float = 1e-2) -> nn.Module:
    """A tiny model after some steps of Adam, a new batch each."""
    module, config, model = models.load(name), models.config(name, "tiny"), tiny(name)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for step in range(steps):
        inputs, target = module.batch(config, seed=step)
        optimizer.zero_grad()
        module.loss(model(*inputs), target).backward()
        optimizer.step()
    return model


def unseen(name: str) -> tuple[tuple[Tensor, ...], Tensor]:
    return models.load(name).batch(models.config(name, "tiny"), seed=1000)


def layers_to_swap(model: nn.Module) -> dict[str, nn.Module]:
    """The depthwise, recurrent and attention layers by name, found without pyarch.

    A Transformer layer counts, and so does the attention inside it.
    """
    return {name: module for name, module in model.named_modules() if is_to_swap(module)}


def is_to_swap(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == module.in_channels > 1
    return isinstance(module, STOCK)


def tensors(output: object) -> list[Tensor]:
    """All tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if torch.is_tensor(leaf)]


def need(backend: str) -> None:
    """Skip with the refusal where the C++ kernels cannot serve."""
    if backend == "cpu" and native.serving()[0] is None:
        pytest.skip(native.serving()[1])

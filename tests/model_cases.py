"""What the tests of pyarch.models expect of each model, counted by hand, and how they find its layers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pyarch
from pyarch import models, native
from pyarch.models import swin

KERNELS = ("cpu", "reference")


@dataclass(frozen=True)
class Expected:
    """What is known of one model.

    Args:
        operator: what its layers compute.
        layers: how many there are to swap, at the real and at the tiny size.
        output: the shape of the tiny model's first output.
        learnt: the share of the first loss that forty steps of Adam leave, at most.
        calls: of F.scaled_dot_product_attention by the tiny model itself, past all layers.
        rate: of the gradient descent whose loss curve is compared with and without pyarch: one at which the
            curve shows if a layer's weight stands still.
    """

    operator: str
    layers: tuple[int, int]
    output: tuple[int, ...]
    learnt: float = 0.75
    calls: int = 0
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
    "bert": Expected("attention", (4, 4), (32, 16, 11)),
    "distillation": Expected("attention", (8, 6), (32, 4), learnt=0.5),
    "gpt": Expected("attention", (4, 4), (8, 33, 8), learnt=0.3),
    "translation": Expected("attention", (10, 5), (16, 5, 8), learnt=0.5),
    "t5": Expected("attention", (0, 0), (16, 3, 11), learnt=0.2, calls=3),
    "longformer": Expected("attention", (2, 2), (16, 24, 4), learnt=0.3),
    "swin": Expected("attention", (12, 4), (8, 4)),
    "vit": Expected("attention", (4, 4), (16, 4), learnt=0.1),
    "timesformer": Expected("attention", (4, 4), (16, 2), learnt=0.1, rate=0.1),
    "cnn_transformer": Expected("attention", (20, 8), (8, 4), learnt=0.2),
    "rnn_transformer": Expected("attention", (6, 6), (16, 12, 4), learnt=0.1),
}

STOCK = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    swin.WindowAttention,
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


def swap(name: str, model: nn.Module, backend: str = "auto") -> pyarch.SwapReport:
    """Swap a model as the demo does; whatever it calls itself runs on the backend only inside `running`."""
    return pyarch.swap(model, backend=backend, sdpa=models.calls_sdpa(name))


def running(name: str, backend: str) -> AbstractContextManager:
    """Where swapped layers are not all of the model, the block in which the rest runs on the backend too."""
    return pyarch.backend(backend) if models.calls_sdpa(name) else nullcontext()


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

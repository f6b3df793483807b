"""Well-known architectures in plain torch.nn: what swap is shown and tested on.

Each module of this package holds one architecture and offers the same six names:

    Config                      frozen dataclass: every size, the batch included
    REAL, TINY                  published widths; a miniature for tests
    build(config)               the nn.Module, initialised from torch's global generator
    inputs(config, seed)        the tuple of tensors that its forward takes
    batch(config, seed)         (inputs, target) of a synthetic task that it learns in seconds
    loss(output, target)        the scalar to minimise

A module whose masks follow a pattern that plain torch has no word for offers a seventh, and a Config with
`masked`, which is False for the same model without the masks:

    patterns(config)            layer names (a glob) -> what a `pyarch.Config` of a rule says of their masks

A module whose Config chooses between several architectures of the same sizes appears under several names.
None of them knows pyarch: the layers are torch.nn's own until `pyarch.swap` re-types them.
"""

import importlib
from dataclasses import dataclass, field, replace
from types import ModuleType

from torch import nn


@dataclass(frozen=True)
class Entry:
    """Where a model is found: its module, what its configurations change in REAL and TINY, how it is swapped.

    `sdpa` is for a model that calls F.scaled_dot_product_attention itself, past all layers.
    """

    module: str
    choice: dict[str, str] = field(default_factory=dict)
    sdpa: bool = False


# In the order in which the demo shows them.
MODELS = {
    "convnext": Entry("pyarch.models.convnext"),
    "mobilenet": Entry("pyarch.models.mobilenet"),
    "aspp": Entry("pyarch.models.aspp"),
    "conformer": Entry("pyarch.models.conformer"),
    "mamba": Entry("pyarch.models.mamba"),
    "rnn_language": Entry("pyarch.models.language", {"cell": "rnn"}),
    "gru_language": Entry("pyarch.models.language", {"cell": "gru"}),
    "lstm_language": Entry("pyarch.models.language", {"cell": "lstm"}),
    "bilstm_classifier": Entry("pyarch.models.classifier"),
    "bilstm_tagger": Entry("pyarch.models.tagger"),
    "seq2seq": Entry("pyarch.models.seq2seq"),
    "crnn": Entry("pyarch.models.crnn"),
    "cnn_bilstm": Entry("pyarch.models.speech"),
    "encoder": Entry("pyarch.models.encoder"),
    "bert": Entry("pyarch.models.bert"),
    "distillation": Entry("pyarch.models.distillation"),
    "gpt": Entry("pyarch.models.gpt"),
    "translation": Entry("pyarch.models.translation"),
    "t5": Entry("pyarch.models.t5", sdpa=True),
    "longformer": Entry("pyarch.models.longformer"),
    "swin": Entry("pyarch.models.swin"),
    "vit": Entry("pyarch.models.vit"),
    "timesformer": Entry("pyarch.models.timesformer"),
    "cnn_transformer": Entry("pyarch.models.cnn_transformer"),
    "rnn_transformer": Entry("pyarch.models.rnn_transformer"),
}

# Size -> the name of the configuration in each module.
SIZES = {"real": "REAL", "tiny": "TINY"}


def names() -> tuple[str, ...]:
    """Return the names of all models, in the order in which the demo shows them."""
    return tuple(MODELS)


def load(name: str) -> ModuleType:
    """Return the module of one model, imported on first use.

    Raises:
        ValueError: no model has that name; the text lists those that there are.
    """
    if name not in MODELS:
        raise ValueError(f"model={name!r} is not known, choose one of {', '.join(MODELS)}")
    return importlib.import_module(MODELS[name].module)


def config(name: str, size: str = "real"):
    """Return the configuration of a model at a size, "real" or "tiny".

    Raises:
        ValueError: the name or the size is not known.
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} is not known, choose one of {', '.join(SIZES)}")
    return replace(getattr(load(name), SIZES[size]), **MODELS[name].choice)


def build(name: str, size: str = "real", *, masked: bool = True) -> nn.Module:
    """Return a freshly initialised model; seed it with torch.manual_seed before.

    Args:
        name, size: as for `config`.
        masked: False leaves out the masks of a model that has `patterns`; its parameters are the same.

    Raises:
        ValueError: the name or the size is not known, or a model without patterns is wanted without masks.
    """
    chosen = config(name, size)
    if not masked:
        if not patterns(name, size):
            raise ValueError(f"model={name!r} has no patterns that could stand for its masks")
        chosen = replace(chosen, masked=False)
    return load(name).build(chosen)


def calls_sdpa(name: str) -> bool:
    """Return whether a model calls F.scaled_dot_product_attention itself: swap it with `sdpa=True`.

    Raises:
        ValueError: the name is not known.
    """
    load(name)
    return MODELS[name].sdpa


def patterns(name: str, size: str = "real") -> dict[str, dict[str, int]]:
    """Return what the masks of a model's layers say, by layer names; empty where no pattern stands for them.

    Raises:
        ValueError: the name or the size is not known.
    """
    stated = getattr(load(name), "patterns", None)
    return stated(config(name, size)) if stated else {}

"""Recurrent parts of Hugging Face models, randomly initialised: swapped, and nothing else changes.

Three ways to call a layer: over a sequence between convolutions (EnCodec), batch first behind an embedding
(the prediction network of Parakeet's transducer), and a cell in a loop with attention (SLANet's table head).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyarch
from tests.model_cases import KERNELS, layers_to_swap, need
from tests.whole_models import check_run, layout, run

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip(
    "transformers", reason="transformers not installed, needs pip install -e .[transformers]"
)

pytestmark = pytest.mark.thirdparty

OPERATOR = "recurrent"


class Codec(nn.Module):
    """EnCodec without the quantiser between encoder and decoder, which stops every gradient."""

    def __init__(self):
        super().__init__()
        sizes = dict(hidden_size=24, num_filters=4, upsampling_ratios=[4, 2], codebook_dim=24)
        codec = transformers.EncodecModel(transformers.EncodecConfig(**sizes))
        self.encoder, self.decoder = codec.encoder, codec.decoder

    def forward(self, audio: Tensor) -> dict[str, Tensor]:
        latent = self.encoder(audio)
        return {"latent": latent, "audio": self.decoder(latent)}


class PredictionNetwork(nn.Module):
    """The part of Parakeet's transducer that reads what was written."""

    def __init__(self):
        super().__init__()
        from transformers.models.parakeet.modeling_parakeet import ParakeetRNNTDecoder

        sizes = dict(vocab_size=40, decoder_hidden_size=24, num_decoder_layers=2, blank_token_id=39)
        self.decoder = ParakeetRNNTDecoder(transformers.ParakeetRNNTConfig(**sizes))

    def forward(self, words: Tensor) -> dict[str, Tensor]:
        return {"states": self.decoder(words)}


class TableHead(nn.Module):
    """SLANet's attention cell, called a few times on given characters; its own loop is float32 alone."""

    CHARACTERS = 10

    def __init__(self):
        super().__init__()
        from transformers.models.slanet.modeling_slanet import SLANetAttentionGRUCell

        self.cell = SLANetAttentionGRUCell(12, 24, self.CHARACTERS)

    def forward(self, features: Tensor, characters: Tensor) -> dict[str, Tensor]:
        state = features.new_zeros(len(features), 24)
        states = []
        for each in F.one_hot(characters, self.CHARACTERS).to(features.dtype).unbind(1):
            state, _ = self.cell(state, features, each)
            states.append(state)
        return {"states": torch.stack(states, 1)}


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and the layers that it must swap."""

    build: type[nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    layers: tuple[str, ...]

    def __str__(self) -> str:
        return self.build.__name__

    def model(self) -> nn.Module:
        """With random weights, in evaluation mode."""
        torch.manual_seed(0)
        return self.build().eval()


CASES = [
    Case(Codec, lambda: (torch.randn(2, 1, 403),), ("encoder.layers.7.lstm", "decoder.layers.1.lstm")),
    Case(PredictionNetwork, lambda: (torch.randint(40, (3, 17)),), ("decoder.lstm",)),
    Case(TableHead, lambda: (torch.randn(3, 20, 12), torch.randint(10, (3, 9))), ("cell.rnn",)),
]

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_case
def test_thirdparty_every_recurrent_layer_is_swapped(case):
    model = case.model()
    classes = {name: type(module) for name, module in layers_to_swap(model).items()}
    report = pyarch.swap(model)
    assert {record.name for record in report.swapped} == set(classes) == set(case.layers)
    for name, cls in classes.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, getattr(pyarch.nn, cls.__name__)) and isinstance(layer, cls)
    with report.observe(), torch.no_grad():
        model(*case.inputs())
    assert not report.never_called


@each_case
@pytest.mark.parametrize("backend", KERNELS)
def test_thirdparty_outputs_and_gradients(case, backend):
    need(backend)
    stock, inputs = case.model(), case.inputs()
    ours = copy.deepcopy(stock)
    report = pyarch.swap(ours, backend=backend)
    check_run(str(case), ours, stock, inputs)
    _, gradients = run(ours, inputs)
    for record in report.swapped:
        parameters = [name for name in gradients if name.startswith(f"{record.name}.")]
        assert parameters and all(gradients[name].count_nonzero() for name in parameters)


@each_case
def test_thirdparty_check_sees_one_wrong_weight(case):
    """The check above is not so wide that one unit's recurrent weights could be off by a thousandth."""
    stock, inputs = case.model(), case.inputs()
    wrong = copy.deepcopy(stock)
    layer = wrong.get_submodule(case.layers[0])
    with torch.no_grad():
        getattr(layer, "weight_hh_l0" if hasattr(layer, "weight_hh_l0") else "weight_hh")[0] *= 1.001
    with pytest.raises(AssertionError, match=f"{case} .* error"):
        check_run(str(case), wrong, stock, inputs)


@each_case
def test_thirdparty_restore_is_exact(case):
    model, inputs = case.model(), case.inputs()
    before, layout_before = run(model, inputs), layout(model)
    report = pyarch.swap(model)
    assert layout(model) != layout_before
    report.restore()
    assert layout(model) == layout_before
    for mine, yours in zip(run(model, inputs), before, strict=True):
        assert list(mine) == list(yours)
        assert all(torch.equal(mine[name], yours[name]) for name in mine)


@pytest.mark.parametrize("backend", KERNELS)
def test_thirdparty_encodec_codes_stay(backend):
    """The whole EnCodec, quantiser and all, with random codes: the same codes, the same audio."""
    need(backend)
    sizes = dict(hidden_size=24, num_filters=4, upsampling_ratios=[4, 2], codebook_dim=24, codebook_size=32)
    model = transformers.EncodecModel(transformers.EncodecConfig(**sizes)).eval()
    audio = torch.randn(2, 1, 403)
    with torch.no_grad():
        latent = model.encoder(audio)
        for name, codes in model.named_buffers():
            if name.endswith(".embed"):
                codes.normal_(latent.mean(), latent.std())
        stock = model(audio)
        report = pyarch.swap(model, backend=backend)
        ours = model(audio)
    assert {record.name for record in report.swapped} == set(CASES[0].layers)
    assert len(stock.audio_codes.unique()) > 8
    assert torch.equal(ours.audio_codes, stock.audio_codes)
    torch.testing.assert_close(ours.audio_values, stock.audio_values)

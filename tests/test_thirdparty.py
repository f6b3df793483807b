"""Hugging Face models, randomly initialised: every depthwise layer is swapped, and nothing else changes.

Beside the comparison of tests/whole_models.py three things keep it meaningful on untrained networks:

- weights of standard deviation 0.1: at the usual 0.02 activations underflow, and zeros equal zeros;
- batch statistics taken once, then evaluation mode: no dropout, no division by the spread of a few pixels;
- SiLU in place of ReLU6, whose gradient jumps where an activation changes side by rounding.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch import native
from tests.whole_models import check_run, layout, run

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip(
    "transformers", reason="transformers not installed, needs pip install -e .[transformers]"
)

pytestmark = pytest.mark.thirdparty

OPERATOR = "depthwise_conv"


@dataclass(frozen=True)
class Case:
    """A model, the shape of its input, the layers that it must swap, what its configuration changes."""

    model: str
    shape: tuple[int, ...]
    layers: int
    settings: dict = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.model, self.note)))


# Layers as each architecture's description counts them: one a block.
CASES = [
    Case(
        "ConvNext", (2, 3, 64, 64), 4, dict(depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 40], image_size=64)
    ),
    Case("MobileNetV2", (4, 3, 96, 96), 17, dict(depth_multiplier=0.25, hidden_act="silu")),
    Case(
        "MobileNetV2",
        (4, 3, 97, 95),
        17,
        dict(depth_multiplier=0.25, hidden_act="silu", tf_padding=False),
        note="padding within the layer",
    ),
    Case(
        "EfficientNet",
        (4, 3, 96, 96),
        8,
        dict(
            width_coefficient=0.25,
            depth_coefficient=1.0,
            num_block_repeats=[1, 1, 1, 1, 1, 1, 2],
            hidden_dim=320,
            image_size=96,
        ),
    ),
    Case(
        "Wav2Vec2Conformer",
        (2, 1600),
        2,
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=[16, 16],
            conv_stride=[5, 4],
            conv_kernel=[10, 8],
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
    ),
    Case(
        "Segformer",
        (4, 3, 96, 96),
        4,
        dict(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 2, 3, 4]),
    ),
    Case(
        "MobileViT",
        (4, 3, 96, 96),
        7,
        dict(
            image_size=96,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
            num_attention_heads=2,
        ),
    ),
]

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def build(case: Case) -> nn.Module:
    """The model with random weights, its batch statistics taken from its input, in evaluation mode."""
    configuration = getattr(transformers, f"{case.model}Config")(**case.settings, initializer_range=0.1)
    model = getattr(transformers, f"{case.model}Model")(configuration)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    model.eval()
    for norm in norms:
        norm.train()
    with torch.no_grad():
        model(*inputs(case))
    return model.eval()


def inputs(case: Case) -> tuple[Tensor]:
    return (torch.randn(case.shape, generator=torch.Generator().manual_seed(1)),)


def executed_depthwise(model: nn.Module, case: Case) -> dict[str, nn.Module]:
    """The depthwise layers whose forward runs, found without pyarch."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == module.in_channels > 1:
            handles.append(
                module.register_forward_hook(lambda layer, *_, name=name: found.update({name: layer}))
            )
    with torch.no_grad():
        model(*inputs(case))
    for handle in handles:
        handle.remove()
    return found


@each_case
def test_thirdparty_every_depthwise_layer_is_swapped(case):
    model = build(case)
    executed = executed_depthwise(model, case)
    classes = {name: type(module) for name, module in executed.items()}
    report = pyarch.swap(model)
    assert len(executed) == case.layers
    assert {record.name for record in report.swapped} == set(executed)
    for name, module in executed.items():
        assert isinstance(module, (pyarch.nn.Conv1d, pyarch.nn.Conv2d))
        assert isinstance(module, classes[name]), "a swapped layer is still what its model checks for"
    with report.observe(), torch.no_grad():
        model(*inputs(case))
    assert not report.never_called


@each_case
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_thirdparty_outputs_and_gradients(case, backend):
    if backend == "cpu" and native.serving()[0] is None:
        pytest.skip(native.serving()[1])
    stock = build(case)
    ours = copy.deepcopy(stock)
    report = pyarch.swap(ours, backend=backend)
    check_run(str(case), ours, stock, inputs(case))
    _, gradients = run(ours, inputs(case))
    assert all(gradients[f"{record.name}.weight"].count_nonzero() for record in report.swapped)


@each_case
def test_thirdparty_check_sees_one_wrong_tap(case):
    """The check above is not so wide that a tap of one depthwise layer could be off by a thousandth."""
    stock = build(case)
    wrong = copy.deepcopy(stock)
    layer = next(iter(executed_depthwise(wrong, case).values()))
    with torch.no_grad():
        layer.weight[..., 0] *= 1.001
    with pytest.raises(AssertionError, match=f"{case.model}.* error"):
        check_run(str(case), wrong, stock, inputs(case))


@each_case
def test_thirdparty_restore_is_exact(case):
    model = build(case)

    before, layout_before = run(model, inputs(case)), layout(model)
    report = pyarch.swap(model)
    assert layout(model) != layout_before
    report.restore()
    assert layout(model) == layout_before
    for mine, yours in zip(run(model, inputs(case)), before, strict=True):
        assert list(mine) == list(yours)
        assert all(torch.equal(mine[name], yours[name]) for name in mine)


def test_thirdparty_mamba_reports_its_convolution_as_never_called():
    """Mamba hands the weight of its conv1d to a function of its own: swapping the module brings nothing."""
    configuration = transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = transformers.MambaModel(configuration).eval()
    report = pyarch.swap(model)
    assert {record.name for record in report.swapped} == {"layers.0.mixer.conv1d", "layers.1.mixer.conv1d"}
    with report.observe(), torch.no_grad():
        model(input_ids=torch.arange(12).view(1, 12))
    assert set(report.never_called) == {"layers.0.mixer.conv1d", "layers.1.mixer.conv1d"}


def test_thirdparty_layer_with_a_forward_of_its_own_is_skipped():
    """Gemma 4's causal convolution pads in its forward: it is left alone, and said so."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioCausalConv1d

    model = nn.Sequential(Gemma4AudioCausalConv1d(8, 8, 5, groups=8), nn.Conv1d(8, 8, 5, padding=2, groups=8))
    sequence = torch.randn(2, 8, 30)
    before = model[0](sequence)
    report = pyarch.swap(model)
    assert [record.name for record in report.swapped] == ["1"]
    (skipped,) = [record for record in report.skipped if record.name == "0"]
    assert "forward" in skipped.reason
    assert type(model[0]) is Gemma4AudioCausalConv1d
    assert torch.equal(model[0](sequence), before)

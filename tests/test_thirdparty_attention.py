"""Parts of Hugging Face models that hold torch.nn.MultiheadAttention, randomly initialised: swapped, proven.

Five ways to call it: a learnt query that pools an image (Siglip), self-attention sequence first with padding
(BridgeTower), masks for each head in a decoder with positions added (OneFormer, Mask2Former), a
cross-attention batch first with a mask (Aria).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import pyarch
from tests.model_cases import KERNELS, need
from tests.whole_models import check_run, layout, run

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip(
    "transformers", reason="transformers not installed, needs pip install -e .[transformers]"
)

pytestmark = pytest.mark.thirdparty

OPERATOR = "attention"
E, H = 32, 4


class Pooled(nn.Module):
    """Siglip's vision model with its attention pooling head."""

    def __init__(self):
        super().__init__()
        sizes = dict(hidden_size=E, intermediate_size=48, num_hidden_layers=1, num_attention_heads=H)
        config = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=4)
        self.model = transformers.SiglipVisionModel(config)
        head = self.model.get_submodule(LAYER_OF_SIGLIP)
        # Hugging Face leaves it at torch's numbers, whose biases are zero.
        nn.init.normal_(head.in_proj_bias, std=0.3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.model(image)
        return {"tokens": found.last_hidden_state, "pooled": found.pooler_output}


class Residual(nn.Module):
    """BridgeTower's residual attention block, one sequence half padding."""

    def __init__(self):
        super().__init__()
        from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerResidualAttention

        self.block = BridgeTowerResidualAttention(transformers.BridgeTowerVisionConfig(hidden_size=128))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        padding = torch.zeros(x.shape[1], x.shape[0], dtype=torch.bool)
        padding[0, -3:] = True
        return {"states": self.block(x, padding)}


class Decoder(nn.Module):
    """A decoder layer of OneFormer: positions added to queries and keys, a mask for each head."""

    def __init__(self):
        super().__init__()
        from transformers.models.oneformer import modeling_oneformer

        self.layer = modeling_oneformer.OneFormerTransformerDecoderQueryTransformerDecoderLayer(
            E, H, dim_feedforward=48, dropout=0.0
        )

    def forward(self, x: Tensor, memory: Tensor, positions: Tensor) -> dict[str, Tensor]:
        mask = torch.arange(memory.shape[0]) % 3 == torch.arange(x.shape[0])[:, None] % 3
        masks = mask.expand(x.shape[1] * H, -1, -1)
        return {"states": self.layer(x, memory, memory_mask=masks, query_pos=positions)}


class Masked(nn.Module):
    """A decoder layer of Mask2Former, whose attention to the image stays inside predicted segments."""

    def __init__(self):
        super().__init__()
        from transformers.models.mask2former import modeling_mask2former

        sizes = dict(hidden_dim=E, num_attention_heads=H, dim_feedforward=48, dropout=0.0)
        config = transformers.Mask2FormerConfig(**sizes)
        self.layer = modeling_mask2former.Mask2FormerMaskedAttentionDecoderLayer(config)

    def forward(self, x: Tensor, memory: Tensor, positions: Tensor) -> dict[str, Tensor]:
        segments = torch.arange(memory.shape[0]) % 4 == torch.arange(x.shape[0])[:, None] % 4
        masks = segments.expand(x.shape[1] * H, -1, -1)
        states, *_ = self.layer(
            x,
            level_index=0,
            position_embeddings=[torch.zeros_like(memory)],
            query_position_embeddings=positions,
            encoder_hidden_states=[memory],
            encoder_attention_mask=masks,
        )
        return {"states": states}


class Cross(nn.Module):
    """Aria's cross-attention of learnt queries to an image, some patches masked."""

    def __init__(self):
        super().__init__()
        from transformers.models.aria.modeling_aria import AriaCrossAttention

        vision = dict(hidden_size=E, num_attention_heads=H, intermediate_size=48, num_hidden_layers=1)
        self.attention = AriaCrossAttention(transformers.AriaConfig(vision_config=vision))

    def forward(self, patches: Tensor, queries: Tensor) -> dict[str, Tensor]:
        mask = torch.zeros(len(queries) * H, queries.shape[1], patches.shape[1], dtype=torch.bool)
        mask[: len(mask) // 2, :, -4:] = True
        return {"states": self.attention(patches, queries, attn_mask=mask)}


LAYER_OF_SIGLIP = "head.attention"


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
    Case(Pooled, lambda: (torch.randn(2, 3, 16, 16),), (f"model.{LAYER_OF_SIGLIP}",)),
    Case(Residual, lambda: (torch.randn(9, 2, 128),), ("block.attn",)),
    Case(
        Decoder,
        lambda: (torch.randn(7, 2, E), torch.randn(11, 2, E), torch.randn(7, 2, E)),
        ("layer.self_attn", "layer.multihead_attn"),
    ),
    Case(
        Masked,
        lambda: (torch.randn(7, 2, E), torch.randn(11, 2, E), torch.randn(7, 2, E)),
        ("layer.cross_attn",),
    ),
    Case(Cross, lambda: (torch.randn(2, 13, E), torch.randn(2, 5, E)), ("attention.multihead_attn",)),
]

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_case
def test_thirdparty_every_attention_is_swapped(case):
    model = case.model()
    held = [name for name, module in model.named_modules() if type(module) is nn.MultiheadAttention]
    report = pyarch.swap(model)
    assert {record.name for record in report.swapped} == set(held) == set(case.layers)
    assert all(type(model.get_submodule(name)) is pyarch.nn.MultiheadAttention for name in held)
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
    """The check above is not so wide that one row of a projection could be off by a thousandth."""
    stock, inputs = case.model(), case.inputs()
    wrong = copy.deepcopy(stock)
    with torch.no_grad():
        wrong.get_submodule(case.layers[-1]).out_proj.weight[0] *= 1.001
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


@each_case
def test_thirdparty_evaluation_without_gradients(case):
    stock, inputs = case.model(), case.inputs()
    ours = copy.deepcopy(stock)
    pyarch.swap(ours)
    with torch.no_grad():
        mine, theirs = ours(*inputs), stock(*inputs)
    for name, wanted in theirs.items():
        torch.testing.assert_close(mine[name], wanted, rtol=1e-4, atol=1e-5)

"""Attention layers on a GPU in each dtype: outputs, weights averaged and of each head, and all gradients.

torch's layer answers on the CPU, in the dtype and in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch import dispatch
from tests.attention_modules_cases import SETTINGS, answers, hold, masks_of, outcome, pair
from tests.gpu_calls import BF16, FP32, each_dtype, full_precision, on_gpu

WIDTH, HEADS, BATCH, QUERIES, KEYS = 48, 4, 2, 33, 65
MASKS = ("none", "bool (L, S)", "float (N H, L, S)", "bool padding", "bool (N H, L, S) and padding")
LAYERS = ("plain", "batch first", "kdim and vdim", "both further keys")


def drawn_inputs(layer: nn.MultiheadAttention, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value as the layer wants them."""
    sizes = ((QUERIES, layer.embed_dim), (KEYS, layer.kdim), (KEYS, layer.vdim))
    inputs = [torch.randn(BATCH, length, width).to(dtype) for length, width in sizes]
    return inputs if layer.batch_first else [each.transpose(0, 1).contiguous() for each in inputs]


def drawn_masks(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    masks = masks_of(QUERIES, KEYS, HEADS, BATCH)[name]
    return {
        key: each.detach().to(dtype).requires_grad_() if each.is_floating_point() else each
        for key, each in masks.items()
    }


def there(value, device: str):
    """A tensor on a device, a leaf where it was one; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device).requires_grad_(value.requires_grad)


def hold_layer(ours: nn.Module, stock: nn.Module, inputs: list[Tensor], device: str, **keywords) -> set[str]:
    """Hold one call to the tolerance rule; the backends that were chosen for it."""
    expected = answers(stock, *inputs, **keywords)
    given = [there(each, device) for each in inputs]
    seen = set()
    with full_precision(), dispatch.recording(lambda op, call, chosen: seen.add((op.name, chosen.name))):
        results = outcome(
            ours.to(device), *given, **{name: there(each, device) for name, each in keywords.items()}
        )
    hold({name: None if each is None else each.cpu() for name, each in results.items()}, expected)
    return seen


def hold_weights(layer: str, mask: str, average: bool, dtype: torch.dtype, device: str, backend: str) -> None:
    ours, stock = pair("MultiheadAttention", WIDTH, HEADS, **SETTINGS[layer])
    ours, stock = ours.to(dtype), stock.to(dtype)
    keywords = drawn_masks(mask, dtype) | dict(need_weights=True, average_attn_weights=average)
    seen = hold_layer(ours, stock, drawn_inputs(stock, dtype), device, **keywords)
    assert {name for name, _ in seen} >= {"attention_forward", "attention_weights", "attention_backward"}
    assert {chosen for _, chosen in seen} == {backend}


each_average = pytest.mark.parametrize("average", [True, False], ids=["mean", "heads"])


@on_gpu
@each_dtype
@each_average
@pytest.mark.parametrize("mask", MASKS)
def test_gpu_attention_module_gives_weights(mask, average, dtype):
    hold_weights("plain", mask, average, dtype, "cuda", "triton")


@on_gpu
@each_dtype
@each_average
@pytest.mark.parametrize("layer", LAYERS[1:])
def test_gpu_attention_module_of_other_settings_gives_weights(layer, average, dtype):
    hold_weights(layer, "bool (L, S)", average, dtype, "cuda", "triton")


BLOCKS = {
    "TransformerEncoderLayer": [(BATCH, KEYS, WIDTH)],
    "TransformerDecoderLayer": [(BATCH, QUERIES, WIDTH), (BATCH, KEYS, WIDTH)],
}


def hold_block(name: str, dtype: torch.dtype, device: str) -> None:
    # Not relu, at whose kink a rounding decides on the gradient.
    ours, stock = pair(name, WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True)
    inputs = [torch.randn(shape).to(dtype) for shape in BLOCKS[name]]
    hold_layer(ours.to(dtype), stock.to(dtype), inputs, device)


@on_gpu
@each_dtype
@pytest.mark.parametrize("name", BLOCKS)
def test_gpu_transformer_layer_matches_float64(name, dtype):
    hold_block(name, dtype, "cuda")


# ------------------------------------------------------------------------------------ rehearsals


@each_average
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("layer", "mask"), [("plain", mask) for mask in MASKS] + [(layer, MASKS[1]) for layer in LAYERS[1:]]
)
def test_gpu_modules_rehearsed(layer, mask, dtype, average):
    with pyarch.backend("reference"):
        hold_weights(layer, mask, average, dtype, "cpu", "reference")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gpu_transformer_layers_rehearsed(name, dtype):
    hold_block(name, dtype, "cpu")

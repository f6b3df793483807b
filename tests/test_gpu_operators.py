"""Every public function on a GPU: its numbers, its backend, strided and misaligned inputs, autocast, NaN.

Each body takes a device; one test rehearses it on the CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pyarch
from pyarch import ops
from tests import attention_cases, conv_cases, recurrent_cases
from tests.attention_definition import hold as hold_attention
from tests.gpu_calls import (
    ANSWERED,
    BF16,
    CALLS,
    FP16,
    FP32,
    INTERPRETED,
    chosen_backends,
    each_dtype,
    full_precision,
    hold,
    on_gpu,
    placed,
)

# ------------------------------------------------------------------------------------ numbers


def hold_call(name: str, dtype: torch.dtype, device: str) -> None:
    call = CALLS[name]
    with full_precision():
        hold(call, dtype, call.outcome(call.leaves(dtype, device)))


@on_gpu
@each_dtype
@pytest.mark.parametrize("name", ANSWERED)
def test_gpu_function_matches_float64(name, dtype):
    hold_call(name, dtype, "cuda")


# The interpreter computes bfloat16 wrongly.
@pytest.mark.parametrize("dtype", [FP32, FP16 if INTERPRETED else BF16], ids=["fp32", "16 bits"])
@pytest.mark.parametrize("name", ANSWERED)
def test_gpu_function_rehearsed(name, dtype):
    hold_call(name, dtype, "cpu")


def backends_of(name: str, device: str) -> set[str]:
    call = CALLS[name]
    seen = chosen_backends(lambda: call.outcome(call.leaves(BF16, device)))
    assert any("forward" in operator or "decode" in operator for operator, _ in seen)
    return {backend for _, backend in seen}


@on_gpu
@pytest.mark.parametrize("name", CALLS)
def test_gpu_function_runs_on_triton(name):
    """Nothing goes to torch in silence."""
    assert backends_of(name, "cuda") == {"triton"}


@pytest.mark.parametrize("name", CALLS)
def test_gpu_function_backends_rehearsed(name):
    with pyarch.backend("reference"):
        assert backends_of(name, "cpu") == {"reference"}


# ------------------------------------------------------------------------------------ strides


def strided(table: dict) -> dict:
    """The cases whose tensors are views: sliced, misaligned, expanded, transposed, channels last."""
    return {
        name: case
        for name, case in table.items()
        if any(
            getattr(case, layout, conv_cases.contiguous) is not conv_cases.contiguous
            for layout in ("layout", "grad_layout", "state_layout")
        )
    }


CONVS = strided(conv_cases.CASES)
LAYERS = strided(recurrent_cases.CASES)
ATTENTIONS = strided(attention_cases.CASES)


def on_device(given, device: str):
    """Tensors in tuples, lists and named tuples on a device, as they lie; the rest as it is."""
    if isinstance(given, Tensor):
        return placed(given, device)
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return type(given)(*(on_device(each, device) for each in given))
    return (
        type(given)(on_device(each, device) for each in given) if isinstance(given, list | tuple) else given
    )


def on_cpu(results: dict) -> dict:
    return {name: None if each is None else each.cpu() for name, each in results.items()}


def hold_strided_conv(name: str, dtype: torch.dtype, device: str, backend: str) -> None:
    case = CONVS[name]
    tensors = case.tensors(dtype)
    with full_precision():
        made = conv_cases.Kernels(backend).both(case, *on_device(tensors, device))
    conv_cases.check_all(case, tensors, [None if each is None else each.cpu() for each in made])


def hold_strided_layer(name: str, dtype: torch.dtype, device: str, backend: str) -> None:
    case = LAYERS[name]
    operands = case.operands(dtype)
    there = on_device(operands, device)._replace(batch_sizes=operands.batch_sizes)
    with full_precision():
        made = recurrent_cases.Layers(backend).run(case, there)
    recurrent_cases.hold_all(case, operands, on_cpu(made))


def hold_strided_attention(name: str, dtype: torch.dtype, device: str, backend: str) -> None:
    case = ATTENTIONS[name]
    operands = on_device(case.operands(dtype), device)
    made = attention_cases.Attentions(backend).run(operands)
    hold_attention(on_cpu(made), attention_cases.answers(case, dtype))


@on_gpu
@each_dtype
@pytest.mark.parametrize("name", CONVS)
def test_gpu_conv_takes_any_strides(name, dtype):
    hold_strided_conv(name, dtype, "cuda", "triton")


@on_gpu
@each_dtype
@pytest.mark.parametrize("name", LAYERS)
def test_gpu_recurrent_takes_any_strides(name, dtype):
    hold_strided_layer(name, dtype, "cuda", "triton")


@on_gpu
@each_dtype
@pytest.mark.parametrize("name", ATTENTIONS)
def test_gpu_attention_takes_any_strides(name, dtype):
    hold_strided_attention(name, dtype, "cuda", "triton")


STRIDED = [(hold_strided_conv, CONVS), (hold_strided_layer, LAYERS), (hold_strided_attention, ATTENTIONS)]


@pytest.mark.parametrize(("body", "table"), STRIDED, ids=["conv", "recurrent", "attention"])
def test_gpu_strides_rehearsed(body, table):
    for name in list(table)[:3]:
        body(name, FP32, "cpu", "triton" if INTERPRETED else "reference")


def test_gpu_placing_keeps_strides():
    view = torch.arange(24.0).view(4, 6)[1:, 1::2].t()
    copy = placed(view, "cpu")
    assert copy.stride() == view.stride() and copy.storage_offset() == 7 and torch.equal(copy, view)


# ------------------------------------------------------------------------------------ autocast, NaN


def hold_autocast(name: str, device: str) -> None:
    """float32 leaves: what bfloat16 gives, and gradients of the leaves' dtype."""
    call = CALLS[name]
    leaves = call.leaves(FP32, device)
    with torch.autocast(device, BF16):
        ours = call.outcome(leaves)
    direct = call.outcome({key: each.to(BF16) for key, each in leaves.items()})
    for key, each in ours.items():
        if key.startswith("gradient"):
            assert each.dtype == FP32
        torch.testing.assert_close(each.float(), direct[key].float(), rtol=0.05, atol=0.05)


AUTOCAST = ["conv 3x3", "conv 7x7 nhwc", "lstm", "gru", "attention", "attention of sequences"]


@on_gpu
@pytest.mark.parametrize("name", AUTOCAST)
def test_gpu_autocast_computes_in_bf16(name):
    hold_autocast(name, "cuda")


def test_gpu_autocast_rehearsed():
    hold_autocast("conv 3x3", "cpu")
    hold_autocast("attention", "cpu")


def hold_nan_of_conv(dtype: torch.dtype, device: str) -> None:
    x, w = torch.randn(2, 33, 65).to(device, dtype), torch.randn(33, 1, 4).to(device, dtype)
    x[1, 7, 30] = torch.nan
    out = ops.depthwise_conv(x, w, padding=3)
    readers = torch.zeros_like(out, dtype=torch.bool)
    readers[1, 7, 30:34] = True
    assert torch.equal(out.isnan(), readers)


def hold_nan_of_recurrent(dtype: torch.dtype, device: str) -> None:
    call = CALLS["lstm"]
    leaves = call.leaves(dtype, device)
    clean = call.results(leaves)[0]
    leaves["x"][3, 2] = torch.nan
    spoilt = call.results(leaves)[0]
    assert spoilt[3:, 2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(spoilt[:, others], clean[:, others]) and torch.equal(spoilt[:3], clean[:3])


def hold_nan_of_attention(dtype: torch.dtype, device: str) -> None:
    """A padded key of NaN reaches nothing, forward and backward."""
    query, key, value = (torch.randn(2, 4, 65, 40).to(device, dtype) for _ in range(3))
    padding = torch.zeros(2, 65, dtype=torch.bool, device=device)
    padding[0, 40:] = padding[1, 3] = True
    outcomes = []
    for filling in (0.0, torch.nan):
        hidden = padding[:, None, :, None]
        leaves = [query, key.masked_fill(hidden, filling), value.masked_fill(hidden, filling)]
        leaves = [each.requires_grad_() for each in leaves]
        out = ops.scaled_dot_product_attention(*leaves, key_padding_mask=padding, is_causal=True)
        outcomes.append([out.detach(), *torch.autograd.grad(out.float().sin().sum(), leaves)])
    for clean, spoilt in zip(*outcomes, strict=True):
        assert spoilt.isfinite().all() and torch.equal(clean, spoilt)


NANS = [hold_nan_of_conv, hold_nan_of_recurrent, hold_nan_of_attention]
each_nan = pytest.mark.parametrize("body", NANS, ids=["conv", "recurrent", "attention"])


@on_gpu
@each_dtype
@each_nan
def test_gpu_nan_stays_where_it_belongs(body, dtype):
    body(dtype, "cuda")


@each_nan
def test_gpu_nan_rehearsed(body):
    body(FP32, "cpu")

"""The public attention function and torch's, side by side on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyarch
from pyarch import dispatch, native
from tests.attention_definition import Operands

ours = pyarch.ops.scaled_dot_product_attention
stock = F.scaled_dot_product_attention

_missing = native.serving()[1]
CPU = pytest.param("cpu", marks=pytest.mark.skipif(bool(_missing), reason=_missing or "never"))
each_backend = pytest.mark.parametrize("backend", [CPU, "reference"])


def drawn(
    queries=9, keys=11, batch=2, heads=3, kv_heads=None, dim=8, value_dim=None, dtype=torch.float32
) -> list[Tensor]:
    """Query, key and value."""
    kv_heads, value_dim = kv_heads or heads, value_dim or dim
    shapes = (batch, heads, queries, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, value_dim)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def arguments_of(operands: Operands) -> tuple[list[Tensor], dict]:
    """A call of the operator in the words of the public function."""
    extras, settings = operands.extras, operands.settings
    is_windowed = settings.left is not None or settings.right is not None
    return list(operands[:3]), dict(
        attn_mask=extras.mask,
        dropout_p=settings.dropout_p,
        is_causal=settings.is_causal,
        scale=settings.scale,
        enable_gqa=operands.query.shape[1] != operands.key.shape[1],
        window=(settings.left, settings.right) if is_windowed else None,
        dilation=settings.dilation,
        global_tokens=settings.global_tokens if extras.global_mask is None else extras.global_mask,
        query_offset=settings.query_offset,
        bias=extras.bias,
        key_padding_mask=extras.padding,
        softcap=settings.softcap or None,
        sinks=extras.sinks,
        distance_bias=extras.distance_bias,
    )


def outcome(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], cotangent: Tensor | None = None
) -> list[Tensor]:
    """What `function` gives on the leaves, and their gradients for the same random cotangent every time."""
    leaves = [each.detach().requires_grad_() for each in leaves]
    result = function(*leaves)
    if cotangent is None:
        generator = torch.Generator().manual_seed(5)
        cotangent = torch.randn(result.shape, generator=generator).to(result.dtype)
    gradients = torch.autograd.grad(result, leaves, cotangent, materialize_grads=True)
    assert not result.numel() or any(each.any() for each in gradients), "every gradient is zero"
    return [result.detach(), *gradients]


def outcome_or_error(*arguments) -> list[Tensor] | tuple[str, str]:
    """`outcome`, or the type and text of its error."""
    try:
        return outcome(*arguments)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        return type(error).__name__, str(error)


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in float64."""
    return [each.double() if each.is_floating_point() else each for each in tensors]


def close(mine, theirs, tolerance=1e-5):
    torch.testing.assert_close(mine, theirs, rtol=10 * tolerance, atol=tolerance)


def ran(backend: str, run: Callable[[], object]) -> tuple[object, list[tuple[str, str]]]:
    """What `run` returns on a backend, and every (operator, backend) that was chosen meanwhile."""
    seen = []
    with (
        dispatch.recording(lambda op, call, chosen: seen.append((op.name, chosen.name))),
        pyarch.backend(backend),
    ):
        return run(), seen

"""Gradients where queries, keys or values have a large part in common, as filled biases of projections give.

A row's gradients of scores sum to nothing, so what all keys have in common cancels in dq; an error that a
row's gradients share, as one of delta is, does not. The rule is kept beside torch's unfused attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyarch import dispatch
from pyarch.ops import scaled_dot_product_attention
from tests.attention_cases import native_attention
from tests.compare import check

OPERATOR = "attention"
NAMES = ("query", "key", "value")


@dataclass(frozen=True)
class Common:
    """So many tokens, whose queries, keys and values are numbers of size 1 plus vectors of these sizes."""

    tokens: int
    query: float
    key: float
    value: float
    causal: bool = False
    dropped: int = 0  # keys that a mask hides

    def __str__(self) -> str:
        sizes = f"{self.query:g} {self.key:g} {self.value:g}"
        return f"{self.tokens} tokens, {sizes}{' causal' * self.causal}{' masked' * bool(self.dropped)}"

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.tokens)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator)

        shape = 2, 3, self.tokens, 32
        sizes = (self.query, self.key, self.value)
        return [(draw(*shape) + size * draw(3, 1, 32)).to(dtype) for size in sizes] + [draw(*shape).to(dtype)]

    def mask(self) -> Tensor | None:
        return torch.arange(self.tokens) < self.tokens - self.dropped if self.dropped else None


CASES = [
    *(Common(tokens, *sizes) for tokens in (16, 49, 144) for sizes in ((0, 10, 0), (1, 3, 3), (3, 10, 10))),
    Common(49, 3, 10, 10, causal=True),
    Common(49, 3, 10, 10, dropped=33),
    Common(64, 3, 10, 10, dropped=1),
]


def gradients(inputs: list[Tensor], case: Common) -> tuple[Tensor, ...]:
    *given, cotangent = inputs
    given = [each.requires_grad_() for each in given]
    mask = case.mask()
    mask = None if mask is None else mask.expand(case.tokens, case.tokens)
    out = scaled_dot_product_attention(*given, attn_mask=mask, is_causal=case.causal)
    return torch.autograd.grad(out, given, cotangent)


def torchs(inputs: list[Tensor], case: Common) -> tuple[Tensor, ...]:
    *given, cotangent = inputs
    given = [each.requires_grad_() for each in given]
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*given, attn_mask=case.mask(), is_causal=case.causal)
    return torch.autograd.grad(out, given, cotangent)


@pytest.mark.parametrize("case", CASES, ids=str)
@native_attention
def test_attention_common_parts_cancel(backend, case, monkeypatch):
    backend.serve(monkeypatch)
    exact = torchs([each.double() for each in case.inputs(torch.float32)], case)
    stock = torchs(case.inputs(torch.float32), case)
    with dispatch.backend("cpu"):
        ours = gradients(case.inputs(torch.float32), case)
    for name, *each in zip(NAMES, ours, stock, exact, strict=True):
        check(name, *each)


@pytest.mark.parametrize("tokens", [16, 49, 144])
@native_attention
def test_attention_common_parts_in_bfloat16(backend, tokens, monkeypatch):
    """Sizes as large as the rest: gradients of scores are rounded to bfloat16 here, and in torch are not."""
    case = Common(tokens, 1, 3, 10)
    backend.serve(monkeypatch)
    exact = torchs([each.double() for each in case.inputs(torch.bfloat16)], case)
    stock = torchs(case.inputs(torch.bfloat16), case)
    with dispatch.backend("cpu"):
        ours = gradients(case.inputs(torch.bfloat16), case)
    for name, *each in zip(NAMES, ours, stock, exact, strict=True):
        check(name, *each)


@native_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_attention_common_parts_of_a_single_visible_key_give_nothing(backend, dtype, monkeypatch):
    """A row that sees one key has a weight of 1 whatever its score, and exactly no gradient of it."""
    case = Common(49, 3, 10, 10)
    backend.serve(monkeypatch)
    *given, cotangent = case.inputs(dtype)
    given = [each.requires_grad_() for each in given]
    with dispatch.backend("cpu"):
        out = scaled_dot_product_attention(*given, window=(0, 0))
        query, key, _ = torch.autograd.grad(out, given, cotangent)
    assert not query.any() and not key.any()

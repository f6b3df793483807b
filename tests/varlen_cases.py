"""Sequences of unequal length: cases as data, and results held sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

import pyarch
from pyarch.ops import attention_varlen
from pyarch.ops.attention_varlen_call import VARLEN_BACKWARD, VARLEN_FORWARD, describe
from pyarch.reference.attention import Extras, Settings
from tests.attention_cases import EVERY_ATTENTION
from tests.attention_definition import Answers, Operands, answers_to, hold
from tests.compare import check
from tests.conv_cases import backend_of, contiguous

every_backend = pytest.mark.parametrize("backend", EVERY_ATTENTION, ids=str)


@dataclass(frozen=True)
class VarlenCase:
    """One call; `keys` None is self-attention. H, Hk, D and Dv are heads, kv_heads, dim and value_dim."""

    lengths: tuple[int, ...] = (5, 1, 9)
    keys: tuple[int, ...] | None = None
    heads: int = 2
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    offset: int | str = 0
    softcap: float = 0.0
    sinks: bool = False
    lse_grad: bool = False
    layout: Callable[[Tensor], Tensor] = contiguous

    def __str__(self) -> str:
        """What differs from the defaults, for the name of a test."""
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name} {getattr(value, '__name__', value)}")
        return ", ".join(parts) or "plain"

    @property
    def of_keys(self) -> tuple[int, ...]:
        return self.lengths if self.keys is None else self.keys

    def ends(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    @property
    def options(self) -> dict:
        """The public function's, but for sinks."""
        softcap = self.softcap or None
        return dict(is_causal=self.causal, window=self.window, query_offset=self.offset, softcap=softcap)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(len(self.lengths))
        queries, keys = sum(self.lengths), sum(self.of_keys)

        def drawn(*shape):
            return torch.randn(shape, generator=generator)

        given = {
            "query": drawn(queries, self.heads, self.dim),
            "key": drawn(keys, self.kv_heads, self.dim),
            "value": drawn(keys, self.kv_heads, self.value_dim),
            "grad out": drawn(queries, self.heads, self.value_dim),
        }
        return {name: self.layout(each.to(dtype)) for name, each in given.items()} | {
            "sinks": drawn(self.heads) if self.sinks else None,
            "grad lse": drawn(self.heads, queries) if self.lse_grad else None,
        }

    def sequences(self, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Operands]]:
        """Each sequence as a call of its own."""
        given = self.tensors(dtype)
        spans = [list(pairwise(self.ends(each).tolist())) for each in (self.lengths, self.of_keys)]
        for (first, end), (first_key, end_key) in zip(*spans, strict=True):
            queries, keys = slice(first, end), slice(first_key, end_key)
            offset = (end_key - first_key) - (end - first) if self.offset == "end" else self.offset
            left, right = self.window or (None, None)
            settings = Settings(
                self.dim**-0.5, self.causal, left, right, query_offset=offset, softcap=self.softcap
            )
            query, grad_out = (as_batch(given[name][queries]) for name in ("query", "grad out"))
            key, value = (as_batch(given[name][keys]) for name in ("key", "value"))
            grad_lse = None if given["grad lse"] is None else given["grad lse"][None, :, queries]
            extras = Extras(sinks=given["sinks"])
            yield queries, keys, Operands(query, key, value, extras, settings, grad_out, grad_lse)


def as_batch(tokens: Tensor) -> Tensor:
    """(T, H, D) as (1, H, T, D)."""
    return tokens.transpose(0, 1)[None]


@lru_cache(maxsize=512)
def answers(case: VarlenCase, dtype: torch.dtype) -> list[tuple[slice, slice, Answers]]:
    return [(queries, keys, answers_to(each)) for queries, keys, each in case.sequences(dtype)]


def need(backend, case: VarlenCase, dtype: torch.dtype) -> None:
    """Skip, quoting the refusals, where the backend does not compute this case."""
    given, settings = case.tensors(dtype), Settings(1.0, softcap=case.softcap)
    tensors = given["query"], given["key"], given["value"], case.ends(case.lengths), given["sinks"]
    call = describe(*tensors, settings, case.offset == "end", True)
    for op in (VARLEN_FORWARD, VARLEN_BACKWARD):
        if reasons := list(backend_of(op, backend.name).refusals(call)):
            pytest.skip("; ".join(reasons))


def run(backend, case: VarlenCase, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Results and gradients by the public function."""
    given = case.tensors(dtype)
    leaves = [
        None if given[name] is None else given[name].detach().requires_grad_()
        for name in ("query", "key", "value", "sinks")
    ]
    *tensors, sinks = leaves
    ends = case.ends(case.lengths), None if case.keys is None else case.ends(case.keys)
    with pyarch.backend(backend.name):
        out, lse = attention_varlen(*tensors, *ends, sinks=sinks, return_lse=True, **case.options)
        arriving = [(out, given["grad out"])]
        if given["grad lse"] is not None:
            arriving.append((lse, given["grad lse"]))
        wanted = [each for each in leaves if each is not None]
        results, cotangents = zip(*arriving, strict=True)
        found = iter(torch.autograd.grad(results, wanted, cotangents))
    gradients = [None if each is None else next(found) for each in leaves]
    names = "grad query", "grad key", "grad value", "grad sinks"
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(names, gradients, strict=True))


def prove(backend, case: VarlenCase, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Run a case and hold every sequence's results to the rule, and the gradient of sinks as their sum."""
    need(backend, case, dtype)
    results = run(backend, case, dtype)
    queries = sum(case.lengths)
    assert results["out"].shape == (queries, case.heads, case.value_dim) and results["out"].is_contiguous()
    assert results["lse"].shape == (case.heads, queries) and results["lse"].is_contiguous()
    assert results["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for of_queries, of_keys, expected in answers(case, dtype):
        own = {name: as_batch(results[name][of_queries]) for name in ("out", "grad query")}
        own |= {name: as_batch(results[name][of_keys]) for name in ("grad key", "grad value")}
        hold(own | {"lse": results["lse"][None, :, of_queries]}, expected)
    if case.sinks:
        stock, truth = (
            sum(getattr(each, name)["grad sinks"] for *_, each in answers(case, dtype))
            for name in ("stock", "truth")
        )
        terms = sum(each.terms["grad sinks"] for *_, each in answers(case, dtype))
        rounding = torch.finfo(torch.float32 if dtype == torch.float32 else dtype).eps
        noise = rounding * terms / truth.abs().max().item()
        check("grad sinks", results["grad sinks"], stock, truth, noise=noise)
    return results

"""Attention of a few new queries on a cache on Triton: by interpreter on a CPU, compiled on a GPU.

Each batch entry is held to attention by definition in float64, and to torch's own error on it. The
interpreter shows the logic in float32 and float16; it computes bfloat16 wrongly and shows neither races nor
speed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from pyarch.reference.attention import Extras, Settings  # noqa: E402
from pyarch.triton_kernels import attention_decode  # noqa: E402
from pyarch.triton_kernels.attention_call import Call  # noqa: E402
from pyarch.triton_kernels.attention_mask import FAR  # noqa: E402
from pyarch.triton_kernels.attention_tuning import MOST_SPLITS  # noqa: E402
from tests.attention_definition import Operands, answers_to, hold  # noqa: E402

OPERATOR = "attention"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="interpreter tests run with TRITON_INTERPRET=1")
no_gpu = INTERPRETED or not torch.cuda.is_available()
on_gpu = pytest.mark.skipif(no_gpu, reason="no CUDA GPU")
by_triton = pytest.mark.parametrize("backend", ["triton"])
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def contiguous(cache: Tensor) -> Tensor:
    return cache


def heads_last(cache: Tensor) -> Tensor:
    """(B, Hk, S, D) as a view of (B, S, Hk, D)."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def features_first(cache: Tensor) -> Tensor:
    """The last dimension outermost in memory."""
    return cache.movedim(-1, 0).contiguous().movedim(0, -1)


@dataclass(frozen=True)
class Case:
    """One call; `positions` are those of each entry's first query."""

    positions: tuple[int, ...] = (40, 0, 199)
    queries: int = 1
    places: int = 200
    heads: int = 2
    kv_heads: int = 1
    dim: int = 8
    value_dim: int | None = None
    left: int | None = None
    softcap: float = 0.0
    sinks: bool = False
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
    def settings(self) -> Settings:
        return Settings(self.dim**-0.5, True, self.left, softcap=self.softcap)

    def arguments(self, dtype: torch.dtype) -> tuple:
        """query, key cache, value cache, positions, sinks; the cache is NaN where no query looks."""
        generator = torch.Generator().manual_seed(0)
        batch = len(self.positions)

        def drawn(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        query = drawn(batch, self.heads, self.queries, self.dim)
        key = drawn(batch, self.kv_heads, self.places, self.dim)
        value = drawn(batch, self.kv_heads, self.places, self.value_dim or self.dim)
        for b, position in enumerate(self.positions):
            for cache in (key, value):
                cache[b, :, max(position + self.queries, 0) :] = torch.nan
                if self.left is not None:
                    cache[b, :, : max(position - self.left, 0)] = torch.nan
        sinks = drawn(self.heads) if self.sinks else None
        positions = torch.tensor(self.positions, dtype=torch.int32)
        return self.layout(query), self.layout(key), self.layout(value), positions, sinks


CASES = [
    Case(),
    Case((3, 99, 0, 150), queries=3, heads=4, kv_heads=2),
    Case((-2, 30, -9), queries=4, places=40),
    Case((-2, 30, -9), queries=4, places=40, sinks=True),
    Case((190, 20), left=30, sinks=True),
    Case((190, 5), queries=5, left=0),
    Case((150,), queries=2, softcap=1.5, sinks=True, heads=3),
    Case((40, 100), queries=20, heads=2, kv_heads=2, places=130),
    Case((99,), queries=9, heads=4, layout=heads_last),
    Case((99,), layout=features_first, dim=20, value_dim=12),
    Case((60,), dim=80, value_dim=40, places=61),
    Case((5,), dim=256, places=70),
    Case((), queries=2),
    Case((0, 0), queries=0),
    Case((-1, 3), places=0),
]
HALF = [CASES[1], CASES[6], CASES[9]]
# One stretch, a few, and more than there are tiles of keys, so that some are empty.
SPLITS = (1, 3, 11)


def hold_entries(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    query, key, value, positions, sinks = case.arguments(dtype)
    there = (None if each is None else each.to(device) for each in (query, key, value, positions, sinks))
    out, lse = attention_decode.forward(*there, case.settings)
    assert out.dtype == dtype and out.shape == (*query.shape[:3], value.shape[3]) and out.is_contiguous()
    assert lse.dtype == FP32 and lse.shape == query.shape[:3] and lse.is_contiguous()
    out, lse = out.cpu(), lse.cpu()
    for b, position in enumerate(case.positions):
        own = slice(b, b + 1)
        settings = case.settings._replace(query_offset=position)
        grad_out = torch.ones_like(out[own])
        operands = Operands(query[own], key[own], value[own], Extras(sinks=sinks), settings, grad_out, None)
        hold({"out": out[own], "lse": lse[own]}, answers_to(operands))


# ------------------------------------------------------------------------------------ numbers


@interpreter
@by_triton
@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_decode_matches_float64_by_interpreter(backend, case, splits, monkeypatch):
    monkeypatch.setattr(attention_decode, "splits_of", lambda call, multiprocessors: splits)
    hold_entries(case, FP32)


@interpreter
@by_triton
@pytest.mark.parametrize("case", HALF, ids=str)
def test_attention_decode_matches_float64_in_half_precision(backend, case, monkeypatch):
    monkeypatch.setattr(attention_decode, "splits_of", lambda call, multiprocessors: 3)
    hold_entries(case, FP16)


@interpreter
@by_triton
def test_attention_decode_combines_more_stretches_than_are_read_at_a_time(backend, monkeypatch):
    monkeypatch.setattr(attention_decode, "splits_of", lambda call, multiprocessors: 70)
    monkeypatch.setattr(attention_decode, "COMBINED_ELEMENTS", 128)
    hold_entries(Case((600,), places=700, heads=1, sinks=True), FP32)


# ------------------------------------------------------------------------------------ stretches


@pytest.mark.parametrize(
    ("multiprocessors", "batch", "places", "left", "splits"),
    [
        (132, 1, 65536, FAR.value, 33),
        (132, 64, 65536, FAR.value, 1),
        (132, 1, 1000, FAR.value, 4),
        (132, 1, 65536, 1000, 4),
        (132, 1, 10, FAR.value, 1),
        (10**6, 1, 2**20, FAR.value, MOST_SPLITS),
        (132, 0, 1000, FAR.value, 4),
    ],
)
def test_attention_decode_divides_for_the_machine_and_the_keys(multiprocessors, batch, places, left, splits):
    call = Call(
        dtype=BF16, precision="ieee", architecture="sm_90", batch=batch, heads=32, kv_heads=8, queries=1,
        keys=places, head_dim=128, value_dim=128, scale=1.0, left=left,
    )  # fmt: skip
    assert attention_decode.splits_of(call, multiprocessors) == splits


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("dim", "dtype", "message"),
    [
        (8, torch.float64, "dtype=torch.float64, needs float32"),
        (264, FP32, "head width 264, the decode kernel needs at most 256"),
    ],
)
def test_attention_decode_refuses_what_has_no_kernel(dim, dtype, message):
    cache = torch.empty(1, 1, 4, dim, dtype=dtype, device="meta")
    positions = torch.empty(1, dtype=torch.int32, device="meta")
    with pytest.raises(NotImplementedError, match=message):
        attention_decode.forward(cache, cache, cache, positions, None, Settings(1.0))


# ------------------------------------------------------------------------------------ on a GPU

LARGE = [
    Case((8000, 17, 4095), 1, 8192, 32, 8, 128),
    Case((8000, 17), 5, 8192, 8, 1, 64, left=1000, sinks=True, softcap=20.0),
]


@pytest.mark.gpu
@on_gpu
@by_triton
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_attention_decode_matches_float64_on_gpu(backend, case, dtype):
    hold_entries(case, dtype, "cuda")


@pytest.mark.gpu
@on_gpu
@by_triton
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_attention_decode_repeats_bitwise_on_gpu(backend, case):
    arguments = [None if each is None else each.cuda() for each in case.arguments(BF16)]
    runs = [attention_decode.forward(*arguments, case.settings) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))


@pytest.mark.gpu
@on_gpu
@by_triton
def test_attention_decode_is_captured_in_a_cuda_graph(backend):
    """Which fails where anything is copied to the host; a replay follows the positions."""
    case = LARGE[0]
    arguments = [None if each is None else each.cuda() for each in case.arguments(BF16)]
    positions = arguments[3]
    expected = attention_decode.forward(*arguments, case.settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_decode.forward(*arguments, case.settings)
    before = positions.clone()
    positions.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured[0], expected[0])
    positions.copy_(before)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(ours, once) for ours, once in zip(captured, expected, strict=True))

"""Attention over sequences of unequal length on Triton: by interpreter on a CPU, compiled on a GPU.

Each sequence is held to attention by definition in float64, and to torch's own error on it. The interpreter
shows the logic in float32 and float16; it computes bfloat16 wrongly and shows neither races nor speed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from pyarch.reference.attention import Extras, Settings  # noqa: E402
from pyarch.tolerance import scale as magnitude  # noqa: E402
from pyarch.triton_kernels import attention_tuning, attention_varlen  # noqa: E402
from pyarch.triton_kernels.attention_sequences import (  # noqa: E402
    sequence_bounds,
    sequence_tile,
    slots_of,
)
from pyarch.triton_kernels.attention_tuning import Tile  # noqa: E402
from tests.attention_definition import Answers, Operands, answers_to, hold  # noqa: E402
from tests.compare import check  # noqa: E402

OPERATOR = "attention"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="interpreter tests run with TRITON_INTERPRET=1")
no_gpu = INTERPRETED or not torch.cuda.is_available()
on_gpu = pytest.mark.skipif(no_gpu, reason="no CUDA GPU")
by_triton = pytest.mark.parametrize("backend", ["triton"])
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
GRADIENTS = ("grad query", "grad key", "grad value", "grad sinks")


# ------------------------------------------------------------------------------------ layouts


def contiguous(tokens: Tensor) -> Tensor:
    return tokens


def heads_first(tokens: Tensor) -> Tensor:
    """(N, H, D) as a view of (H, N, D)."""
    return tokens.transpose(0, 1).contiguous().transpose(0, 1)


def of_one_projection(tokens: Tensor) -> Tensor:
    """The middle third of a tensor three times as wide, with NaN around it."""
    wide = torch.full((*tokens.shape[:2], 3 * tokens.shape[2]), float("nan"), dtype=tokens.dtype)
    return wide[..., tokens.shape[2] : 2 * tokens.shape[2]].copy_(tokens)


def features_first(tokens: Tensor) -> Tensor:
    """The last dimension outermost in memory."""
    return tokens.movedim(-1, 0).contiguous().movedim(0, -1)


def expanded(tokens: Tensor) -> Tensor:
    """One token for all."""
    return tokens[:1].expand(tokens.shape)


# ------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """One call. `lengths` are (queries, keys) of each sequence; `offset` may be "end"."""

    lengths: tuple[tuple[int, int], ...] = ((5, 7), (18, 20))
    heads: int = 2
    kv_heads: int = 1
    dim: int = 8
    value_dim: int | None = None
    causal: bool = False
    left: int | None = None
    right: int | None = None
    offset: int | str = 0
    softcap: float = 0.0
    sinks: bool = False
    lse_grad: bool = False
    layout: Callable[[Tensor], Tensor] = contiguous
    grad_layout: Callable[[Tensor], Tensor] = contiguous

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
        offset = 0 if self.offset == "end" else self.offset
        return Settings(
            self.dim**-0.5, self.causal, self.left, self.right, query_offset=offset, softcap=self.softcap
        )

    def starts(self, side: int) -> Tensor:
        lengths = torch.tensor([0, *(pair[side] for pair in self.lengths)], dtype=torch.int32)
        return lengths.cumsum(0, dtype=torch.int32)

    def drawn(self, dtype: torch.dtype) -> Drawn:
        generator = torch.Generator().manual_seed(0)
        queries, keys = (int(self.starts(side)[-1]) for side in (0, 1))
        value_dim = self.value_dim or self.dim

        def tokens(*shape):
            return self.layout(torch.randn(shape, generator=generator).to(dtype))

        return Drawn(
            tokens(queries, self.heads, self.dim),
            tokens(keys, self.kv_heads, self.dim),
            tokens(keys, self.kv_heads, value_dim),
            torch.randn(self.heads, generator=generator).to(dtype) if self.sinks else None,
            self.grad_layout(torch.randn(queries, self.heads, value_dim, generator=generator).to(dtype)),
            torch.randn(self.heads, queries, generator=generator) if self.lse_grad else None,
        )


@dataclass(frozen=True)
class Drawn:
    """The tensors of a call."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor | None

    def to(self, device: str) -> Drawn:
        tensors = (getattr(self, field.name) for field in fields(self))
        return Drawn(*(None if each is None else each.to(device) for each in tensors))


RAGGED = ((5, 7), (0, 0), (18, 33), (0, 9), (4, 0), (1, 20))
CASES = [
    Case(RAGGED),
    Case(RAGGED, causal=True),
    Case(RAGGED, causal=True, offset="end", heads=4, kv_heads=2),
    Case(RAGGED, causal=True, left=6, offset="end", heads=1),
    Case(RAGGED, left=3, right=2, offset="end", kv_heads=2),
    Case(RAGGED, offset=-3, causal=True, sinks=True, lse_grad=True),
    Case(RAGGED, softcap=2.0, sinks=True, causal=True, offset="end", heads=3),
    Case(causal=True, left=5, right=0, offset=4),
    Case(((1, 1),) * 5, causal=True),
    Case(((0, 0), (0, 0), (3, 4), (0, 0))),
    Case(((40, 50), (1, 33)), causal=True, offset="end", heads=1, dim=16),
    Case(dim=20, value_dim=12, causal=True),
    Case(dim=80, value_dim=40, lse_grad=True),
    Case(dim=3, value_dim=24, left=None, right=4),
    Case(((0, 0),)),
    Case(()),
    *(Case(causal=True, layout=layout, grad_layout=layout) for layout in (heads_first, of_one_projection)),
    Case(layout=features_first, grad_layout=expanded, heads=4, lse_grad=True),
]
HALF = [CASES[0], CASES[3], CASES[6], CASES[11]]


def answers_of(case: Case, drawn: Drawn) -> list[Answers]:
    """The definition's answers to each sequence by itself."""
    cu_q, cu_k = case.starts(0).tolist(), case.starts(1).tolist()
    answers = []
    for s, (queries, keys) in enumerate(case.lengths):
        own, seen = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        settings = case.settings
        if case.offset == "end":
            settings = settings._replace(query_offset=keys - queries)
        parts = [drawn.query[own], drawn.key[seen], drawn.value[seen], drawn.grad_out[own]]
        query, key, value, grad_out = (part.transpose(0, 1)[None] for part in parts)
        grad_lse = None if drawn.grad_lse is None else drawn.grad_lse[None, :, own]
        extras = Extras(sinks=drawn.sinks)
        answers.append(answers_to(Operands(query, key, value, extras, settings, grad_out, grad_lse)))
    return answers


def forward_of(case: Case, drawn: Drawn) -> tuple[Tensor, Tensor]:
    device = drawn.query.device
    starts = case.starts(0).to(device), case.starts(1).to(device)
    at_end = case.offset == "end"
    return attention_varlen.forward(
        drawn.query, drawn.key, drawn.value, *starts, drawn.sinks, case.settings, at_end
    )


def results_of(case: Case, drawn: Drawn, needs: tuple[bool, ...] | None = None) -> dict[str, Tensor | None]:
    """Forward and backward by the kernels."""
    out, lse = forward_of(case, drawn)
    device = drawn.query.device
    needs = (True, True, True, drawn.sinks is not None) if needs is None else needs
    gradients = attention_varlen.backward(
        drawn.grad_out, drawn.grad_lse, drawn.query, drawn.key, drawn.value, out, lse,
        case.starts(0).to(device), case.starts(1).to(device), drawn.sinks, case.settings,
        case.offset == "end", needs,
    )  # fmt: skip
    assert [each is not None for each in gradients] == list(needs)
    return {"out": out, "lse": lse} | dict(zip(GRADIENTS, gradients, strict=True))


def of_sequences(case: Case, results: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The results of each sequence, as a batch of one."""
    cu_q, cu_k = case.starts(0).tolist(), case.starts(1).tolist()
    parts = []
    for s in range(len(case.lengths)):
        own, seen = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        tokens = {"out": own, "grad query": own, "grad key": seen, "grad value": seen}
        part = {name: results[name][where].transpose(0, 1)[None] for name, where in tokens.items()}
        parts.append(part | {"lse": results["lse"][None, :, own]})
    return parts


def hold_sequences(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    drawn = case.drawn(dtype)
    results = {
        name: None if each is None else each.cpu()
        for name, each in results_of(case, drawn.to(device)).items()
    }
    assert results["out"].dtype == dtype and results["out"].is_contiguous()
    assert results["lse"].dtype == FP32 and results["lse"].is_contiguous()
    for name, like in zip(GRADIENTS, (drawn.query, drawn.key, drawn.value, drawn.sinks), strict=True):
        if like is not None:
            assert results[name].shape == like.shape and results[name].dtype == dtype
            assert results[name].stride() == torch.empty_like(like).stride()
    answers = answers_of(case, drawn)
    for part, expected in zip(of_sequences(case, results), answers, strict=True):
        hold(part, expected)
    if case.sinks:
        hold_sinks(results["grad sinks"], answers)


def hold_sinks(ours: Tensor, answers: list[Answers]) -> None:
    """The sinks' gradient is a sum over all sequences; rounding counts as in `hold`."""
    stock = sum(each.stock["grad sinks"] for each in answers)
    truth = sum(each.truth["grad sinks"] for each in answers)
    rounding = max(torch.finfo(FP32).eps * each.carries for each in answers)
    if ours.dtype != FP32:
        rounding += torch.finfo(ours.dtype).eps / 2
    noise = rounding * sum(each.terms["grad sinks"] for each in answers) / magnitude(truth)
    check("grad sinks", ours, stock, truth, noise=noise)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 by 16, so that few tokens make many full tiles and edges."""
    monkeypatch.setattr(attention_tuning.Tuning, "tile", lambda *_: Tile(16, 16, 4, 1))


# ------------------------------------------------------------------------------------ numbers


@interpreter
@by_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_varlen_matches_float64_by_interpreter(backend, case, small_tiles):
    hold_sequences(case, FP32)


@interpreter
@by_triton
@pytest.mark.parametrize("case", HALF, ids=str)
def test_attention_varlen_matches_float64_in_half_precision(backend, case, small_tiles):
    hold_sequences(case, FP16)


@interpreter
@by_triton
@pytest.mark.parametrize("dim", [40, 96, 128])
def test_attention_varlen_with_the_tiles_that_ship(backend, dim):
    hold_sequences(Case(((35, 70), (3, 5), (0, 4)), 1, 1, dim, causal=True, offset="end"), FP32)


@interpreter
@by_triton
def test_attention_varlen_forward_of_the_widest_heads(backend, small_tiles):
    case = Case(heads=1, dim=256, value_dim=192, causal=True)
    drawn = case.drawn(FP32)
    out, lse = forward_of(case, drawn)
    results = {name: out for name in ("grad query", "grad key", "grad value")} | {"out": out, "lse": lse}
    for part, expected in zip(of_sequences(case, results), answers_of(case, drawn), strict=True):
        hold({"out": part["out"], "lse": part["lse"]}, expected)


@interpreter
@by_triton
def test_attention_varlen_computes_what_is_needed_alone(backend, small_tiles):
    case = Case(causal=True, sinks=True)
    drawn = case.drawn(FP32)
    whole = results_of(case, drawn)
    for number, name in enumerate(GRADIENTS):
        needs = tuple(each == number for each in range(4))
        assert torch.equal(results_of(case, drawn, needs)[name], whole[name])


@interpreter
@by_triton
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_attention_varlen_sequences_do_not_see_each_other(backend, case, small_tiles):
    """A sequence of NaN leaves the others as they were, bit by bit."""
    drawn = case.drawn(FP32)
    clean = of_sequences(case, results_of(case, drawn))
    lost = 2
    cu_q, cu_k = case.starts(0), case.starts(1)
    for tensor, cu in (
        (drawn.query, cu_q),
        (drawn.key, cu_k),
        (drawn.value, cu_k),
        (drawn.grad_out, cu_q),
    ):
        tensor[cu[lost] : cu[lost + 1]] = torch.nan
    dirty = of_sequences(case, results_of(case, drawn))
    assert dirty[lost]["out"].isnan().all()
    for number, (ours, expected) in enumerate(zip(dirty, clean, strict=True)):
        for name in ours if number != lost else ():
            assert torch.equal(ours[name], expected[name]), (number, name)


@interpreter
@by_triton
def test_attention_varlen_of_one_sequence_is_that_of_a_batch(backend, small_tiles):
    from pyarch.triton_kernels import attention

    case = Case(((33, 40),), causal=True, offset="end", heads=4)
    drawn = case.drawn(FP32)
    out, lse = forward_of(case, drawn)
    batch = (tokens.transpose(0, 1)[None] for tokens in (drawn.query, drawn.key, drawn.value))
    like, lse_like = attention.forward(*batch, Extras(), case.settings._replace(query_offset=7))
    assert torch.equal(out.transpose(0, 1)[None], like) and torch.equal(lse[None], lse_like)


# ------------------------------------------------------------------------------------ who serves which tile


@triton.jit
def tiles_kernel(starts_ptr, found_ptr, sequences, BLOCK: tl.constexpr):
    """(sequence, tile, first token, tokens) of each slot."""
    slot = tl.program_id(0)
    sequence, tile = sequence_tile(slot, starts_ptr, sequences, BLOCK)
    begin, tokens = sequence_bounds(sequence, starts_ptr)
    tl.store(found_ptr + 4 * slot, sequence)
    tl.store(found_ptr + 4 * slot + 1, tile)
    tl.store(found_ptr + 4 * slot + 2, begin.to(tl.int32))
    tl.store(found_ptr + 4 * slot + 3, tokens)


@interpreter
@by_triton
@pytest.mark.parametrize("seed", range(6))
def test_attention_varlen_every_tile_is_served_once(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, [1, 3, 17, 40, 70, 33][seed] + 1, (13,), generator=generator)
    lengths = lengths * (torch.rand(13, generator=generator) < 0.8)
    starts = torch.cat([torch.zeros(1), lengths]).cumsum(0).int()
    slots = slots_of(int(starts[-1]), len(lengths), 16)
    found = torch.zeros(slots, 4, dtype=torch.int32)
    tiles_kernel[(slots,)](starts, found, len(lengths), 16)
    served = []
    for sequence, tile, begin, tokens in found.tolist():
        assert begin == starts[sequence] and tokens == lengths[sequence]
        if tile * 16 < tokens:
            served.append((sequence, tile))
    wanted = [(s, tile) for s, length in enumerate(lengths.tolist()) for tile in range(-(-length // 16))]
    assert served == wanted


# ------------------------------------------------------------------------------------ refusals


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (empty(4, 1, 8, dtype=torch.float64), "dtype=torch.float64, needs float32"),
        (empty(4, 1, 264), "head width 264, the forward kernel needs at most 256"),
    ],
)
def test_attention_varlen_refuses_what_has_no_kernel(tokens, message):
    starts = empty(2, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=message):
        attention_varlen.forward(tokens, tokens, tokens, starts, starts, None, Settings(1.0), False)


def test_attention_varlen_backward_refuses_wide_heads_of_float32():
    tokens, starts = empty(4, 1, 192), empty(2, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="backward_dkdv kernel needs at most 128"):
        attention_varlen.backward(
            tokens, None, tokens, tokens, tokens, tokens, empty(1, 4), starts, starts, None, Settings(1.0),
            False, (True, True, True, False),
        )  # fmt: skip


# ------------------------------------------------------------------------------------ on a GPU

LARGE = [
    Case(((1000, 1000), (1, 1), (0, 0), (333, 77), (129, 1024)), 8, 2, 64, causal=True, offset="end"),
    Case(((1000, 1000), (1, 1), (513, 700)), 4, 4, 128, left=200, right=100, sinks=True, softcap=20.0),
]


@pytest.mark.gpu
@on_gpu
@by_triton
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_attention_varlen_matches_float64_on_gpu(backend, case, dtype):
    hold_sequences(case, dtype, "cuda")


@pytest.mark.gpu
@on_gpu
@by_triton
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_attention_varlen_repeats_bitwise_on_gpu(backend, case):
    drawn = replace(case, lse_grad=True).drawn(BF16).to("cuda")
    runs = [results_of(case, drawn) for _ in range(3)]
    for again in runs[1:]:
        for name, first in runs[0].items():
            assert first is None or torch.equal(first, again[name]), name


@pytest.mark.gpu
@on_gpu
@by_triton
def test_attention_varlen_is_captured_in_a_cuda_graph(backend):
    """Which fails where anything is copied to the host."""
    case = LARGE[0]
    drawn = case.drawn(BF16).to("cuda")
    starts = case.starts(0).cuda(), case.starts(1).cuda()
    arguments = drawn.query, drawn.key, drawn.value, *starts, None, case.settings, True
    expected = attention_varlen.forward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_varlen.forward(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(ours, once) for ours, once in zip(captured, expected, strict=True))

"""attention_decode on every backend that takes CPU tensors, held to float64 by the tolerance rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import pyarch
from pyarch.ops import attention_decode, scaled_dot_product_attention
from pyarch.reference.attention import Extras, Settings
from tests.attention_cases import DTYPES, EVERY_ATTENTION
from tests.attention_definition import Answers, Operands, answers_to, hold
from tests.attention_functions import each_backend

OPERATOR = "attention_decode"
NAN = float("nan")
every_backend = pytest.mark.parametrize("backend", EVERY_ATTENTION, ids=str)


@dataclass(frozen=True)
class DecodeCase:
    """One step: `lengths` tokens in caches of `places`, then `queries` new ones."""

    lengths: tuple[int, ...] = (5, 0, 12)
    queries: int = 1
    places: int = 16
    heads: int = 2
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8
    left: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    strided: bool = False

    @property
    def options(self) -> dict:
        window = None if self.left is None else (self.left, 0)
        return dict(window=window, softcap=self.softcap or None)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """The caches hold NaN behind their tokens; with `strided` they are (B, S, Hk, D) in memory."""
        generator = torch.Generator().manual_seed(self.places)
        batch = len(self.lengths)

        def drawn(heads, tokens, width):
            made = torch.randn(batch, heads, tokens, width, generator=generator).to(dtype)
            return made.transpose(1, 2).contiguous().transpose(1, 2) if self.strided else made

        caches = [drawn(self.kv_heads, self.places, width) for width in (self.dim, self.value_dim)]
        for cache in caches:
            for entry, length in zip(cache, self.lengths, strict=True):
                entry[:, length:] = NAN
        return {
            "query": drawn(self.heads, self.queries, self.dim),
            "key_cache": caches[0],
            "value_cache": caches[1],
            "key": drawn(self.kv_heads, self.queries, self.dim),
            "value": drawn(self.kv_heads, self.queries, self.value_dim),
            "sinks": torch.randn(self.heads, generator=generator) if self.sinks else None,
        }


CASES = [
    DecodeCase(),
    DecodeCase(()),
    DecodeCase((3, 7), queries=0),
    DecodeCase((0, 15), queries=1),
    DecodeCase((5, 2), queries=3),
    DecodeCase((700, 256, 255, 257), places=701, heads=4, kv_heads=1, dim=64, value_dim=64),
    DecodeCase((700, 3), places=710, queries=4, heads=4, kv_heads=2, dim=40, value_dim=24, sinks=True),
    DecodeCase((300, 40), places=310, queries=9, heads=4, kv_heads=2, left=20),
    DecodeCase((513,), places=520, heads=8, kv_heads=1, dim=128, value_dim=128),
    DecodeCase((513, 1), places=520, heads=3, kv_heads=1, dim=80, value_dim=33, strided=True),
    DecodeCase((700, 4), places=705, left=300, dim=59, value_dim=111),
    DecodeCase((700, 4), places=705, left=0, sinks=True),
    DecodeCase((70, 4), places=75, queries=2, left=9, softcap=3.0, sinks=True, strided=True),
    DecodeCase((90,), places=200, queries=100),
]


@lru_cache(maxsize=256)
def answers(case: DecodeCase, dtype: torch.dtype) -> list[Answers]:
    """Of each batch entry, on as many keys as its last query sees."""
    given, found = case.tensors(dtype), []
    for entry, length in enumerate(case.lengths):
        one = slice(entry, entry + 1)
        key, value = (
            torch.cat([given[cache][one, :, :length], given[name][one]], 2)
            for cache, name in (("key_cache", "key"), ("value_cache", "value"))
        )
        settings = Settings(case.dim**-0.5, True, case.left, None, query_offset=length, softcap=case.softcap)
        query = given["query"][one]
        grad = torch.zeros(*query.shape[:3], case.value_dim, dtype=dtype)
        extras = Extras(sinks=given["sinks"])
        found.append(answers_to(Operands(query, key, value, extras, settings, grad, None)))
    return found


def serve(backend, case: DecodeCase, monkeypatch) -> None:
    """Make this the backend, or skip, quoting the refusals."""
    backend.serve(monkeypatch)
    try:
        with pyarch.backend(backend.name):
            run(case, torch.float32)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal).partition("refuses this call: ")[2])


def run(case: DecodeCase, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor(case.lengths, dtype=torch.int64)
    return attention_decode(**case.tensors(dtype), lengths=lengths, return_lse=True, **case.options)


def hold_all(results: Sequence[Tensor], case: DecodeCase, dtype: torch.dtype) -> None:
    out, lse = results
    shape = len(case.lengths), case.heads, case.queries
    assert out.shape == (*shape, case.value_dim) and out.is_contiguous() and out.dtype == dtype
    assert lse.shape == shape and lse.is_contiguous() and lse.dtype == torch.float32
    for entry, expected in enumerate(answers(case, dtype)):
        one = slice(entry, entry + 1)
        hold({"out": out[one], "lse": lse[one]}, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
@every_backend
def test_attention_decode_results(backend, case, dtype, monkeypatch):
    serve(backend, case, monkeypatch)
    with pyarch.backend(backend.name):
        hold_all(run(case, dtype), case, dtype)


@every_backend
def test_attention_decode_writes_the_new_tokens_and_nothing_else(backend, monkeypatch):
    case = DecodeCase((5, 2), queries=3)
    serve(backend, case, monkeypatch)
    given = case.tensors(torch.float32)
    before = {name: given[name].clone() for name in ("key_cache", "value_cache")}
    with pyarch.backend(backend.name):
        out = attention_decode(**given, lengths=torch.tensor(case.lengths))
        for name in ("key", "value"):
            cache, was = given[f"{name}_cache"], before[f"{name}_cache"]
            for entry, length in enumerate(case.lengths):
                assert torch.equal(cache[entry, :, length : length + 3], given[name][entry])
                was[entry, :, length : length + 3] = given[name][entry]
            assert torch.equal(cache.nan_to_num(7.0), was.nan_to_num(7.0))
        held = {name: given[name] for name in ("query", "key_cache", "value_cache")}
        again = attention_decode(**held, lengths=torch.tensor(case.lengths) + 3)
    assert torch.equal(out, again)


@each_backend
def test_attention_decode_lengths_of_every_kind(backend):
    case = DecodeCase((5, 5), queries=2)
    with pyarch.backend(backend):
        outs = [
            attention_decode(**case.tensors(torch.float32), lengths=lengths)
            for lengths in (5, torch.tensor([5, 5]), torch.tensor([5, 5], dtype=torch.int32))
        ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@each_backend
def test_attention_decode_token_by_token_is_causal_attention(backend):
    """A cache that grows gives what one call on the whole sequence gives."""
    query, key, value = (torch.randn(2, 3, 20, 8) for _ in range(3))
    caches = [torch.full((2, 3, 32, 8), NAN) for _ in range(2)]
    with pyarch.backend(backend):
        steps = []
        for first, end in ((0, 7), (7, 8), (8, 9), (9, 12), (12, 20)):
            new = [each[:, :, first:end] for each in (query, key, value)]
            steps.append(attention_decode(new[0], *caches, first, key=new[1], value=new[2]))
        whole = scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(torch.cat(steps, 2), whole)


@every_backend
def test_attention_decode_queries_before_the_beginning_see_nothing(backend, monkeypatch):
    case = DecodeCase((1, 5), queries=3)
    serve(backend, case, monkeypatch)
    given = case.tensors(torch.float32)
    held = [given[name] for name in ("query", "key_cache", "value_cache")]
    with pyarch.backend(backend.name):
        out, lse = attention_decode(*held, torch.tensor(case.lengths), return_lse=True)
    assert not out[0, :, :2].any() and (lse[0, :, :2] == -float("inf")).all()
    assert out.isfinite().all() and out[0, :, 2].any() and lse[0, :, 2].isfinite().all()


@every_backend
def test_attention_decode_does_not_depend_on_threads(backend, monkeypatch):
    """Keys are split the same way whatever the number of threads, and repeat to the bit.

    torch splits its products by threads: of it only two runs on as many are the same.
    """
    case = DecodeCase((700, 333), places=701, heads=4, kv_heads=2, dim=64, value_dim=64)
    serve(backend, case, monkeypatch)
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            with pyarch.backend(backend.name):
                outs.append(run(case, torch.float32))
    finally:
        torch.set_num_threads(before)
    for one, other in ((outs[1], outs[2]), (outs[0], outs[1]))[: 1 if backend.name == "torch" else 2]:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    hold_all(outs[1], case, torch.float32)


def test_attention_decode_in_float64():
    case = DecodeCase((5, 2), queries=3)
    out = attention_decode(**case.tensors(torch.float64), lengths=torch.tensor(case.lengths))
    for entry, expected in enumerate(answers(case, torch.float64)):
        torch.testing.assert_close(out[entry : entry + 1], expected.truth["out"])


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        (dict(lengths=15), ValueError, "0 to 14, with 2 new tokens in a cache of 16, got 15 to 15"),
        (dict(lengths=torch.tensor([3, 15])), ValueError, "in a cache of 16, got 3 to 15"),
        (dict(lengths=torch.tensor([-1, 3])), ValueError, "got -1 to 3"),
        (dict(lengths=torch.tensor([1.0, 3.0])), TypeError, "lengths must be int32 or int64"),
        (dict(lengths=torch.tensor([3])), ValueError, r"lengths must be \(batch,\) = \(2,\), got \(1,\)"),
        (dict(lengths=True), TypeError, "lengths must be a tensor or an integer, got True"),
        (dict(lengths=torch.tensor([3, 4]).to("meta")), ValueError, "lengths must be on cpu, got meta"),
        (dict(key=None), ValueError, "key and value must be given both or neither"),
        (dict(key=torch.randn(2, 2, 1, 8)), ValueError, r"key must be \(2, 2, 2, 8\), got \(2, 2, 1, 8\)"),
        (dict(value=torch.randn(2, 2, 2, 9)), ValueError, r"value must be \(2, 2, 2, 8\)"),
        (dict(key_cache=torch.randn(2, 2, 16, 8).half()), TypeError, "key_cache must be torch.float32"),
        (
            dict(query=torch.randn(2, 3, 2, 8)),
            ValueError,
            "3 query heads cannot share 2 key and 2 value heads",
        ),
        (dict(query=torch.ones(2, 2, 2, 8, dtype=torch.int64)), TypeError, "query must be float32"),
        (dict(window=(-2, 0)), ValueError, "got left -2"),
        (dict(softcap=-2.0), ValueError, "softcap must be positive"),
        (dict(sinks=torch.randn(3)), ValueError, r"sinks must be \(heads,\) = \(2,\), got \(3,\)"),
    ],
)
def test_attention_decode_says_what_does_not_fit(changes, kind, text):
    given = DecodeCase((3, 7), queries=2).tensors(torch.float32)
    caches = [given[name].clone() for name in ("key_cache", "value_cache")]
    with pytest.raises(kind, match=text):
        attention_decode(**given | dict(lengths=torch.tensor([3, 7])) | changes)
    for cache, name in zip(caches, ("key_cache", "value_cache"), strict=True):
        assert torch.equal(cache.nan_to_num(7.0), given[name].nan_to_num(7.0)), "an error has written"


@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache", "key", "value"])
def test_attention_decode_has_no_backward_and_says_so(name):
    given = DecodeCase((3, 7), queries=2).tensors(torch.float32)
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"no backward and {name} requires a gradient"):
        attention_decode(**given, lengths=3)
    with torch.no_grad():
        assert not attention_decode(**given, lengths=3).requires_grad


def test_attention_decode_a_named_backend_refuses_by_name():
    case = replace(DecodeCase(), sinks=True)
    with pyarch.backend("torch"), pytest.raises(NotImplementedError, match="sinks, stock SDPA has none"):
        run(case, torch.float32)


# ------------------------------------------------------------------------------------ compilation


@each_backend
def test_attention_decode_compiles_whole(backend):
    """One graph for every length, and the caches are written."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attention_decode, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((5, 2), (9, 3)):
        case = DecodeCase(lengths, queries=2)
        results = []
        for function in (compiled, attention_decode):
            given = case.tensors(torch.float32)
            with pyarch.backend(backend):
                out = function(**given, lengths=torch.tensor(lengths))
            results.append((out, given["key_cache"].nan_to_num(7.0), given["value_cache"].nan_to_num(7.0)))
        torch.testing.assert_close(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_attention_decode_operator_keeps_torchs_contract():
    given = DecodeCase((3, 7), queries=2).tensors(torch.float32)
    caches = given["key_cache"].nan_to_num(), given["value_cache"].nan_to_num()
    settings = 0.3, True, 3, None, 1, 0, 0, 0.0, 0.0
    arguments = given["query"], *caches, torch.tensor([3, 7], dtype=torch.int32), None, *settings, "auto"
    torch.library.opcheck(torch.ops.pyarch.attention_decode.default, arguments)

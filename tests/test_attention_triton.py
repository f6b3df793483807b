"""The forward and the weights of attention on Triton: by interpreter on a CPU, compiled on a GPU.

The operator's cases (attention_cases) are held to attention by definition in float64. The interpreter shows
the logic (patterns, masks, tails, strides) in float32 and float16; it computes bfloat16 wrongly and shows no
speed.
The backward has tests of its own (test_attention_backward_triton.py).
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.attention_cases import CASES, DISTANCES, LAYOUTS, MASKS, PATTERNS, RESIDUES, SCORES, Case, answers
from tests.attention_definition import composed, hold, visible_of
from tests.compare import check

pytest.importorskip("triton", reason="Triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from pyarch.reference.attention import Extras, Settings  # noqa: E402
from pyarch.reference.philox import keep_mask, threshold  # noqa: E402
from pyarch.triton_kernels import attention, attention_tuning  # noqa: E402
from pyarch.triton_kernels.attention_call import Call  # noqa: E402
from pyarch.triton_kernels.attention_mask import (  # noqa: E402
    FAR,
    edge_count,
    edge_start,
    kept_tile,
    key_tiles,
    query_tiles,
)
from pyarch.triton_kernels.attention_tiles import pieces_of  # noqa: E402
from pyarch.triton_kernels.attention_tuning import Tile  # noqa: E402

OPERATOR = "attention"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="interpreter tests run with TRITON_INTERPRET=1")
no_gpu = INTERPRETED or not torch.cuda.is_available()
by_triton = pytest.mark.parametrize("backend", ["triton"])
FP32, FP16 = torch.float32, torch.float16
# The interpreter takes a second for two heads of 512 queries and keys.
MOST_SCORES = 30_000
SMALL = {name: case for name, case in CASES.items() if case.queries * case.keys <= MOST_SCORES}
HALF = {
    name: case
    for name, case in (PATTERNS | MASKS | SCORES | DISTANCES).items()
    if case.queries * case.keys <= 3000
}
WEIGHTED = [
    Case(33, 35, causal=True, heads=4, kv_heads=2),
    Case(33, 35, mask="bqk", lost=True, padding=True, sinks=True, softcap=4.0),
    Case(33, 35, bias="hqk", left=3, right=2, dilation=3),
    Case(33, 35, left=3, right=2, global_mask=True, dropout=0.3),
    Case(70, 40, left=3, right=2, dilation=2, global_tokens=3, dropout=0.5),
    Case(33, 35, dim=40, offset=-9, causal=True),
    Case(40, 35, distance="h", left=9, right=2, heads=4, kv_heads=2),
    Case(9, 11, dropout=1.0),
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 by 16, so that few tokens make many full tiles and edges."""
    monkeypatch.setattr(attention_tuning.Tuning, "tile", lambda *_: Tile(16, 16, 4, 1))


def hold_forward(case: Case, dtype: torch.dtype) -> None:
    operands = case.operands(dtype)
    out, lse = attention.forward(*operands[:5])
    assert lse.dtype == FP32 and lse.is_contiguous()
    hold({"out": out, "lse": lse}, answers(case, dtype))


@interpreter
@by_triton
@pytest.mark.parametrize("name", SMALL)
def test_attention_forward_matches_float64_by_interpreter(backend, name):
    hold_forward(SMALL[name], FP32)


@interpreter
@by_triton
@pytest.mark.parametrize("name", HALF)
def test_attention_forward_matches_float64_in_half_precision(backend, name):
    hold_forward(HALF[name], FP16)


@interpreter
@by_triton
@pytest.mark.parametrize("name", PATTERNS | MASKS)
def test_attention_forward_visits_every_tile_that_is_seen(backend, name, small_tiles):
    hold_forward((PATTERNS | MASKS)[name], FP32)


@interpreter
@by_triton
@pytest.mark.parametrize("case", RESIDUES[::3], ids=str)
def test_attention_forward_of_every_remainder(backend, case, small_tiles):
    hold_forward(replace(case, causal=case.queries % 2 == 0), FP32)


@interpreter
@by_triton
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_output_lies_as_torchs(backend, name):
    operands = LAYOUTS[name].operands(FP32)
    out, _ = attention.forward(*operands[:5])
    like = torch.nn.functional.scaled_dot_product_attention(
        *operands[:3], enable_gqa=operands.query.shape[1] != operands.key.shape[1]
    )
    assert out.stride() == like.stride()


@interpreter
@by_triton
@pytest.mark.parametrize("mean", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", WEIGHTED, ids=str)
def test_attention_weights_match_float64(backend, case, dtype, mean, small_tiles):
    operands = case.operands(dtype)
    wide = composed(operands.as_dtype(torch.float64))
    stock = composed(operands.as_dtype(FP32))
    lse = wide.lse.float()
    ours = attention.weights(operands.query, operands.key, lse, *operands[3:5], mean)
    truth, stock = (each.probabilities * each.passed for each in (wide, stock))
    if mean:
        truth, stock = truth.mean(1), stock.mean(1)
    assert ours.is_contiguous()
    # lse is given in float32 and the probabilities carry its rounding, as in torch's float32.
    check(
        "weights",
        ours,
        stock.to(dtype),
        truth,
        noise=torch.finfo(FP32).eps * lse.abs().nan_to_num(0, 0, 0).max(),
    )


# ------------------------------------------------------------------------------------ NaN


@interpreter
@by_triton
@pytest.mark.parametrize(
    "case",
    [
        Case(33, 70, causal=True),
        Case(33, 70, left=5, right=2),
        Case(33, 70, left=5, right=2, dilation=3, batch=1),
        Case(33, 70, left=2, right=2, global_tokens=3, causal=True),
        Case(33, 70, padding=True, lost=True),
        Case(33, 70, mask="bk", lost=True, heads=4, kv_heads=2),
        Case(70, 33, causal=True, offset=-20, sinks=True),
    ],
    ids=str,
)
def test_attention_forward_keeps_unseen_nan_out(backend, case, small_tiles):
    operands = case.operands(FP32)
    visible = visible_of(operands)
    group = operands.query.shape[1] // operands.key.shape[1]
    unseen = ~visible.any(-2).unflatten(1, (-1, group)).any(2)
    blind = ~visible.any(-1)
    assert unseen.any() or blind.any()
    expected = attention.forward(*operands[:5])
    poisoned = operands._replace(
        query=operands.query.masked_fill(blind[..., None], torch.nan),
        key=operands.key.masked_fill(unseen[..., None], torch.nan),
        value=operands.value.masked_fill(unseen[..., None], torch.nan),
    )
    for ours, clean in zip(attention.forward(*poisoned[:5]), expected, strict=True):
        assert torch.equal(ours, clean)
    weights = attention.weights(poisoned.query, poisoned.key, expected[1], *poisoned[3:5], False)
    assert weights.isfinite().all()


@interpreter
@by_triton
def test_attention_forward_hands_seen_nan_on(backend, small_tiles):
    operands = Case(33, 70, batch=1, causal=True).operands(FP32)
    operands.value[0, 0, 20] = torch.nan
    out, _ = attention.forward(*operands[:5])
    # Queries 16 to 19 do not see the key, but share a tile with queries that do.
    assert out[0, 0, 20:].isnan().all() and out[0, 0, :16].isfinite().all() and out[0, 1].isfinite().all()


# ------------------------------------------------------------------------------------ tiles that are visited


@triton.jit
def ranges_kernel(
    starts_ptr, count_ptr, full_ptr, sees_all_ptr,
    first, last, count, shift, left, right, ahead, step, tokens,
    OF_QUERIES: tl.constexpr, HAS_GLOBAL: tl.constexpr, ALL_EDGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The edge tiles and the range of full tiles that one tile visits."""
    sees_all = tl.load(sees_all_ptr) != 0
    if OF_QUERIES:
        begin, outside, lo, full_lo, full_hi, hi, end = query_tiles(
            first, last, count, shift, left, right, ahead, step, tokens, sees_all,
            HAS_GLOBAL, False, ALL_EDGE, BLOCK,
        )  # fmt: skip
    else:
        begin, outside, lo, full_lo, full_hi, hi, end = key_tiles(
            first, last, count, left, right, ahead, step, tokens, sees_all, HAS_GLOBAL, False, ALL_EDGE, BLOCK
        )
    edges = edge_count(begin, outside, lo, full_lo, full_hi, end, BLOCK)
    tl.store(count_ptr, edges)
    tl.store(full_ptr, full_lo)
    tl.store(full_ptr + 1, full_hi)
    for number in range(0, edges):
        tl.store(starts_ptr + number, edge_start(number, begin, outside, lo, full_lo, full_hi, BLOCK))


PATTERNS_OF_RANGES = [
    Settings(1.0, is_causal, left, right, dilation, tokens, offset)
    for (is_causal, (left, right), dilation, tokens), offset in zip(
        product((False, True), ((None, None), (3, 0), (0, 10), (-2, 9), (200, None)), (1, 3), (0, 5, 50)),
        [0, -7, 0, 30, 11, 0, -20] * 9,
        strict=False,
    )
]


@interpreter
@by_triton
@pytest.mark.parametrize("of_queries", [False, True], ids=["keys of queries", "queries of keys"])
@pytest.mark.parametrize("settings", PATTERNS_OF_RANGES, ids=str)
def test_attention_ranges_of_tiles_are_exact(backend, settings, of_queries):
    """Every tile with something visible is visited once, full ones are full, and none else is full."""
    block, mine, Tq, Tk = 8, 8, 45, 59
    call = Call(
        dtype=FP32, precision="ieee", architecture="default", batch=1, heads=1, kv_heads=1,
        queries=Tq, keys=Tk, head_dim=8, value_dim=8, scale=1.0, **attention.pattern_of(settings, False),
    )  # fmt: skip
    operands = Case(Tq, Tk, 1, 1).operands(FP32)._replace(settings=settings, extras=Extras())
    visible = visible_of(operands)[0, 0]
    tokens = settings.global_tokens
    for query_class in range(min(call.step, 2)):
        key_class = (query_class + settings.query_offset) % call.step
        shift = (query_class + settings.query_offset - key_class) // call.step
        seen = visible[query_class :: call.step, key_class :: call.step]
        seen = seen.T if of_queries else seen
        for first in range(0, len(seen), 2 * mine):
            last = min(first + mine, len(seen)) - 1
            moved = 0 if of_queries else shift
            sees_all = call.has_global and first <= tokens - 1 - moved and last + moved >= 0
            starts, found = torch.zeros(64, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
            ranges_kernel[(1,)](
                starts, found, found[1:], torch.tensor([int(sees_all)]), first + moved, last + moved,
                seen.shape[1], shift, call.left, call.right, call.ahead, call.step, tokens,
                of_queries, call.has_global, call.lattice, block,
            )  # fmt: skip
            count, full_lo, full_hi = found.tolist()
            edges = starts[:count].tolist()
            full = range(full_lo, full_hi, block)
            assert len({*edges, *full}) == len(edges) + len(full)
            for start in range(0, seen.shape[1], block):
                tile = seen[first : last + 1, start : start + block]
                whole = tile.shape[1] == block and bool(tile.all())
                assert start not in full or whole
                assert start in full or start in edges or not tile.any()
                if not call.has_global and not call.lattice:
                    assert (start in full) == whole


# ------------------------------------------------------------------------------------ dropout's stream


@triton.jit
def kept_kernel(
    seed_ptr, kept_ptr, head, first_row, first_col, step, threshold, CLASSES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of what dropout keeps."""
    rows = first_row + tl.arange(0, BLOCK_M)
    kept = kept_tile(tl.load(seed_ptr), head, rows, first_col, step, threshold, CLASSES, BLOCK_N)
    offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(kept_ptr + offsets, kept.to(tl.int8))


@interpreter
@by_triton
@pytest.mark.parametrize("dropout_p", [2**-32, 0.1, 0.5, 1 - 2**-33])
@pytest.mark.parametrize("seed", [0, -5, 2**63 - 1])
@pytest.mark.parametrize(("first_col", "step"), [(0, 1), (64, 1), (3, 5), (1, 2)])
def test_attention_dropout_is_the_references(backend, seed, dropout_p, first_col, step):
    kept = torch.empty(16, 32, dtype=torch.int8)
    args = 4, 7, first_col, step, threshold(dropout_p) - 2**31, step != 1, 16, 32
    kept_kernel[(1,)](torch.tensor(seed), kept, *args)
    expected = keep_mask(torch.tensor(seed), dropout_p, 2, 3, 23, 200)[1, 1]
    assert torch.equal(kept.bool(), expected[7:23, first_col : first_col + 32 * step : step])


# ------------------------------------------------------------------------------------ host side


@pytest.mark.parametrize(
    ("width", "pieces"),
    [(0, (16, 0)), (1, (16, 0)), (16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (59, (64, 0)), (64, (64, 0))]
    + [(80, (64, 16)), (96, (64, 32)), (111, (128, 0)), (192, (128, 64)), (200, (256, 0)), (256, (256, 0))],
)
def test_attention_pieces_of_a_width(width, pieces):
    assert pieces_of(width) == pieces


def test_attention_reaches_in_positions():
    pattern = attention.pattern_of(Settings(1.0, left=3, right=None, dilation=4, global_tokens=2), False)
    assert (pattern["left"], pattern["right"], pattern["ahead"]) == (12, FAR.value, FAR.value)
    assert pattern["has_global"]
    assert not attention.pattern_of(Settings(1.0, is_causal=True, global_tokens=2), True)["has_global"]
    assert attention.pattern_of(Settings(1.0, is_causal=True), False)["ahead"] == 0


def test_attention_precision_follows_torchs_switch():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, name in ((True, "tf32"), (False, "ieee")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert attention.fp32_precision() == name
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("query", "settings", "message"),
    [
        (empty(1, 1, 4, 8, dtype=torch.float64), Settings(1.0), "dtype=torch.float64, needs float32"),
        (empty(1, 1, 4, 264), Settings(1.0), "head width 264, the forward kernel needs at most 256"),
        (empty(1, 1, 4, 8), Settings(1.0, query_offset=2**30), "tokens, needs fewer than 1073741824"),
    ],
)
def test_attention_refuses_what_has_no_kernel(query, settings, message):
    with pytest.raises(NotImplementedError, match=message):
        attention.forward(query, query, query, Extras(), settings)


# ------------------------------------------------------------------------------------ the table of tiles


ROW = dict(
    kernel="forward", product="16", scores="any", width_up_to=64, block_m=64, block_n=64, num_warps=4,
    num_stages=2,
)  # fmt: skip


def table_with(row: dict) -> dict:
    splitting = {"programs_per_multiprocessor": 2, "tiles_at_least": 4}
    default = {"measured_on": None, "splitting": splitting, "rows": [row]}
    return {"schema": 1, "architectures": {"default": default}}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"schema": 2, "architectures": {}}, "schema: needs 1"),
        ({"schema": 1, "architectures": {}}, 'architectures: needs an object with "default"'),
        (
            {"schema": 1, "architectures": {"default": {"rows": []}}},
            "default.measured_on: needs a device name or null",
        ),
        (
            {"schema": 1, "architectures": {"default": {"measured_on": None, "rows": []}}},
            "default.splitting.programs_per_multiprocessor: needs a positive integer, not None",
        ),
        (table_with({}), r"default.rows\[0\]: needs exactly"),
        (table_with(ROW | {"kernel": "forwards"}), r"rows\[0\].kernel: needs one of .*, not 'forwards'"),
        (table_with(ROW | {"num_stages": 0}), r"rows\[0\].num_stages: needs a positive integer, not 0"),
        (table_with(ROW | {"block_m": 48}), r"rows\[0\].block_m: needs a power of two, not 48"),
    ],
)
def test_attention_tile_table_errors_name_the_place(table, message):
    with pytest.raises(ValueError, match=message):
        attention_tuning.check_table(table, "attention.json")


def test_attention_tile_table_takes_a_whole_row():
    attention_tuning.check_table(table_with(ROW), "attention.json")


# ------------------------------------------------------------------------------------ on a GPU


on_gpu = pytest.mark.skipif(no_gpu, reason="no CUDA GPU")
LARGE = [
    Case(1024, 1024, 2, 4, dim=64),
    Case(1023, 1024, 2, 4, dim=128, causal=True),
    Case(1000, 1000, 1, 4, 2, dim=96, left=200, right=0, causal=True),
    Case(1000, 1000, 1, 2, dim=256, bias="hqk", padding=True, lost=True),
    Case(1000, 1000, 1, 2, dim=64, left=5, right=5, dilation=3, dropout=0.1, softcap=20.0, sinks=True),
    Case(1000, 1000, 1, 2, dim=80, left=64, right=64, global_mask=True, mask="bqk"),
]


def moved(operands, device: str):
    def move(tensor):
        return None if tensor is None else tensor.to(device)

    return operands._replace(
        query=move(operands.query), key=move(operands.key), value=move(operands.value),
        extras=Extras(*map(move, operands.extras)),
    )  # fmt: skip


def run_on_gpu(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return attention.forward(*moved(case.operands(dtype), "cuda")[:5])


@pytest.mark.gpu
@on_gpu
@by_triton
@pytest.mark.parametrize("dtype", [FP32, FP16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", [*CASES.values(), *LARGE], ids=str)
def test_attention_forward_matches_float64_on_gpu(backend, case, dtype):
    out, lse = run_on_gpu(case, dtype)
    hold({"out": out.cpu(), "lse": lse.cpu()}, answers(case, dtype))


@pytest.mark.gpu
@on_gpu
@by_triton
@pytest.mark.parametrize("mean", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_attention_weights_match_float64_on_gpu(backend, case, mean):
    operands = case.operands(torch.bfloat16)
    wide, stock = (composed(operands.as_dtype(dtype)) for dtype in (torch.float64, FP32))
    there = moved(operands, "cuda")
    ours = attention.weights(there.query, there.key, wide.lse.float().cuda(), *there[3:5], mean)
    truth, stock = (each.probabilities * each.passed for each in (wide, stock))
    if mean:
        truth, stock = truth.mean(1), stock.mean(1)
    check("weights", ours.cpu(), stock.to(torch.bfloat16), truth)


@pytest.mark.gpu
@on_gpu
@by_triton
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_attention_forward_repeats_bitwise_on_gpu(backend, case):
    runs = [run_on_gpu(case, torch.bfloat16) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again, strict=True))


@pytest.mark.gpu
@on_gpu
@by_triton
def test_attention_forward_is_captured_in_a_cuda_graph(backend):
    operands = moved(LARGE[4].operands(torch.bfloat16), "cuda")
    expected = attention.forward(*operands[:5])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention.forward(*operands[:5])
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(ours, once) for ours, once in zip(captured, expected, strict=True))

"""Attention at the operator's contract: cases as data and the backends of this machine.

B, H, Hk, Tq, Tk, D, Dv as in tests/attention_definition.py, which says what a result is and what is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from pyarch import hardware
from pyarch.ops import attention
from pyarch.ops.attention_call import describe
from pyarch.reference.attention import Extras, Settings
from tests.attention_definition import GRADIENTS, RESULTS, Answers, Operands, answers_to, hold
from tests.conv_cases import Kernels, backend_of, contiguous, expanded, misaligned, sliced

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------------------ layouts


def heads_last(tensor: Tensor) -> Tensor:
    """(B, H, T, D) as a view of (B, T, H, D), as a projection gives it."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def features_first(tensor: Tensor) -> Tensor:
    """The last dimension outermost in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def one_head_for_all(tensor: Tensor) -> Tensor:
    """Heads expanded from the first one."""
    return tensor[:, :1].expand(tensor.shape)


def one_sample_for_all(tensor: Tensor) -> Tensor:
    """The batch expanded from its first sample."""
    return tensor[:1].expand(tensor.shape)


def rows_reversed(tensor: Tensor) -> Tensor:
    """Every second row of a tensor twice as long, with NaN in the rows between."""
    gaps = torch.full((*tensor.shape[:2], 2 * tensor.shape[2], tensor.shape[3]), float("nan"))
    return gaps.to(tensor.dtype)[:, :, ::2].copy_(tensor)


# ------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """One call. `mask` and `bias` name the dimensions, of b h q k, that they do not broadcast over,
    `distance` those of b h, of a bias of distances.

    `lost` hides everything from the second query (the only one, where there is one) through the mask, and all
    keys of the last sample through the padding; `factor` scales the query, `shift` is added to the bias.
    """

    queries: int = 5
    keys: int = 7
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    dim: int = 8
    value_dim: int | None = None
    scale: float | None = None
    causal: bool = False
    left: int | None = None
    right: int | None = None
    dilation: int = 1
    global_tokens: int = 0
    offset: int = 0
    softcap: float = 0.0
    dropout: float = 0.0
    mask: str | None = None
    bias: str | None = None
    distance: str | None = None
    extras_dtype: torch.dtype | None = None
    shift: float = 0.0
    padding: bool = False
    global_mask: bool = False
    sinks: bool = False
    lost: bool = False
    lse_grad: bool = False
    layout: Callable[[Tensor], Tensor] = contiguous
    grad_layout: Callable[[Tensor], Tensor] = contiguous
    factor: float = 1.0
    seed: int = 0

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
        return Settings(
            scale=self.dim**-0.5 if self.scale is None else self.scale,
            is_causal=self.causal,
            left=self.left,
            right=self.right,
            dilation=self.dilation,
            global_tokens=self.global_tokens,
            query_offset=self.offset,
            softcap=self.softcap,
            dropout_p=self.dropout,
        )

    def shape_over(self, dimensions: str) -> tuple[int, ...]:
        """The 4-D shape of a mask or bias that varies over some of b h q k."""
        sizes = zip("bhqk", (self.batch, self.heads, self.queries, self.keys), strict=True)
        return tuple(size if letter in dimensions else 1 for letter, size in sizes)

    def operands(self, dtype: torch.dtype) -> Operands:
        generator = torch.Generator().manual_seed(self.seed)
        kv_heads, value_dim = self.kv_heads or self.heads, self.value_dim or self.dim

        def drawn(*shape):
            return torch.randn(shape, generator=generator)

        def seen(*shape):
            return torch.rand(shape, generator=generator) < 0.7

        query = self.factor * drawn(self.batch, self.heads, self.queries, self.dim)
        key = drawn(self.batch, kv_heads, self.keys, self.dim)
        value = drawn(self.batch, kv_heads, self.keys, value_dim)
        mask = bias = padding = global_mask = distance_bias = None
        if self.mask is not None:
            mask = seen(*self.shape_over(self.mask))
            mask[..., :1] = True
            if self.lost:
                mask[..., min(1, mask.shape[2] - 1), :] = False
        if self.bias is not None:
            bias = (drawn(*self.shape_over(self.bias)) + self.shift).to(self.extras_dtype or dtype)
        if self.padding:
            padding = ~seen(self.batch, self.keys)
            padding[:, :1] = False
            padding[self.batch - self.lost :] = True
        if self.global_mask:
            global_mask = ~seen(self.batch, max(self.keys, self.queries + self.offset))
        if self.distance is not None:
            sizes = self.shape_over(self.distance)[:2]
            distance_bias = drawn(*sizes, max(self.queries + self.keys - 1, 0)) + self.shift
            distance_bias = distance_bias.to(self.extras_dtype or dtype)
        return Operands(
            *(self.layout(each.to(dtype)) for each in (query, key, value)),
            Extras(
                mask,
                bias,
                padding,
                global_mask,
                drawn(self.heads).to(self.extras_dtype or dtype) if self.sinks else None,
                torch.tensor(self.seed + 2**40 + 7) if 0 < self.dropout < 1 else None,
                distance_bias,
            ),
            self.settings,
            self.grad_layout(drawn(self.batch, self.heads, self.queries, value_dim).to(dtype)),
            drawn(self.batch, self.heads, self.queries) if self.lse_grad else None,
        )


def table(*cases: Case) -> dict[str, Case]:
    """Cases by their names."""
    named = {str(case): case for case in cases}
    assert len(named) == len(cases), "a case is listed twice"
    return named


_PAIRS = [(1, 1), (3, 3), (64, 1), (239, 1), (799, 3), (113, 203), (1023, 1024), (1024, 1023)]
_RAGGED = [(1, 1000), (63, 65), (65, 63), (127, 64), (64, 128)]
_LAYOUTS = [heads_last, features_first, sliced, misaligned, expanded, one_head_for_all, one_sample_for_all]
_LAYOUTS += [rows_reversed]

SIZES = table(
    *(Case(queries, keys, batch=1, heads=1, dim=16) for queries, keys in (*_PAIRS, *_RAGGED)),
    *(Case(queries, keys, batch=1, causal=True) for queries, keys in _PAIRS[2:6]),
    *(Case(33, 35, dim=dim) for dim in (1, 3, 40, 59, 64, 80, 96, 111, 128, 192, 256)),
    *(
        Case(20, 33, dim=dim, value_dim=value_dim)
        for dim, value_dim in ((8, 5), (5, 8), (64, 128), (128, 64), (40, 1), (96, 111))
    ),
    *(Case(9, 11, heads=4, kv_heads=kv_heads) for kv_heads in (1, 2)),
    Case(9, 11, heads=6, kv_heads=2, value_dim=5, causal=True),
    *(Case(5, 7, batch=1, heads=1, scale=scale) for scale in (0.0, -0.5, 3.0)),
)
EMPTY = table(
    Case(batch=0),
    Case(queries=0),
    Case(keys=0),
    Case(batch=0, bias="hqk", mask="bqk", padding=True),
    Case(keys=0, bias="bhqk", padding=True),
    Case(keys=0, sinks=True, lse_grad=True),
    Case(queries=0, keys=0, causal=True, sinks=True),
)
PATTERNS = table(
    *(Case(queries, keys, causal=True) for queries, keys in ((5, 7), (7, 5), (1, 9), (9, 1), (70, 130))),
    *(Case(queries, 9, causal=True, offset=offset) for queries, offset in ((4, 5), (4, 2), (3, -2), (4, 20))),
    *(Case(70, 70, left=left, right=right) for left, right in ((0, 0), (1, 1), (3, 0), (0, 5), (70, 70))),
    *(Case(70, 70, left=left, right=right) for left, right in ((2, None), (None, 2), (1000, 1000))),
    *(
        Case(70, 70, causal=True, left=left, right=right)
        for left, right in ((9, 0), (0, 0), (5, 5), (9, None))
    ),
    Case(40, 90, left=7, right=3, offset=50),
    Case(90, 40, left=7, right=3, offset=-20),
    Case(90, 40, left=7, right=3, offset=-20, global_tokens=2),
    Case(90, 40, left=7, right=3, offset=-20, global_mask=True, causal=True),
    Case(200, 200, batch=1, left=17, right=0, causal=True),
    *(Case(40, 45, left=3, right=2, dilation=dilation) for dilation in (2, 7)),
    Case(40, 45, dilation=3),
    Case(40, 45, left=2, right=None, dilation=3, causal=True),
    Case(40, 45, left=3, right=3, dilation=2, offset=4),
    Case(40, 40, left=2, right=2, global_tokens=1),
    Case(40, 40, left=2, right=2, global_tokens=5, causal=True),
    Case(40, 40, left=2, right=2, global_tokens=100),
    Case(10, 40, left=2, right=2, global_tokens=3, offset=30),
    Case(40, 40, left=2, right=2, global_mask=True),
    Case(40, 40, left=2, right=0, global_mask=True, causal=True, global_tokens=2, dilation=2),
    Case(12, 40, left=2, right=2, global_mask=True, offset=20),
    Case(20, 20, batch=1, dropout=0.3),
    Case(33, 67, dropout=0.5, causal=True, heads=4, kv_heads=2, value_dim=5),
    Case(20, 20, left=4, right=0, dropout=0.1, lse_grad=True),
    Case(20, 20, dropout=1.0),
)
MASKS = table(
    *(Case(9, 11, mask=over) for over in ("", "k", "q", "qk", "bk", "hqk", "bqk", "bhqk")),
    *(Case(9, 11, bias=over) for over in ("", "k", "q", "h", "qk", "bk", "hqk", "bqk", "bhqk")),
    *(Case(9, 11, bias=over, extras_dtype=torch.float32) for over in ("hqk", "bhqk")),
    Case(9, 11, mask="bk", bias="hqk", padding=True, causal=True),
    Case(70, 70, bias="hqk", left=5, right=5),
    Case(70, 130, mask="qk", causal=True),
    Case(70, 130, mask="bqk", bias="bk", lost=True),
    Case(9, 11, padding=True),
    Case(70, 130, padding=True, left=20, right=20),
    Case(9, 11, mask="qk", lost=True),
    Case(9, 11, mask="bhqk", lost=True, lse_grad=True),
    Case(9, 11, padding=True, lost=True),
    Case(9, 11, padding=True, lost=True, sinks=True, lse_grad=True),
    Case(1, 9, mask="bhqk", lost=True),
    Case(9, 11, heads=4, kv_heads=2, bias="hqk", mask="bqk"),
    Case(9, 11, heads=4, kv_heads=1, bias="bhqk", sinks=True, dropout=0.2, lse_grad=True),
)
SCORES = table(
    Case(9, 11, lse_grad=True),
    Case(9, 11, lse_grad=True, causal=True, value_dim=5),
    Case(9, 11, bias="qk", shift=-200.0),
    Case(9, 11, bias="bhqk", shift=-200.0, lse_grad=True, extras_dtype=torch.float32),
    Case(9, 11, bias="qk", shift=150.0, extras_dtype=torch.float32),
    *(Case(33, 35, factor=factor, dim=16) for factor in (1e4, -1e4)),
    Case(33, 35, factor=100.0, dim=16, causal=True),
    *(Case(9, 11, softcap=softcap, factor=8.0) for softcap in (0.5, 20.0)),
    Case(33, 35, softcap=2.0, bias="hqk", causal=True, lse_grad=True),
    Case(9, 11, softcap=5.0, factor=1e4),
    Case(9, 11, sinks=True),
    Case(9, 11, sinks=True, extras_dtype=torch.float32, causal=True),
    Case(9, 11, sinks=True, mask="bhqk", lost=True, lse_grad=True),
    Case(33, 35, sinks=True, softcap=3.0, left=4, right=0, heads=4, kv_heads=2),
)
LAYOUTS = table(
    *(Case(9, 11, heads=3, layout=layout, grad_layout=layout) for layout in _LAYOUTS),
    *(Case(9, 11, heads=4, kv_heads=2, layout=layout, causal=True) for layout in _LAYOUTS[:3]),
    *(Case(9, 11, grad_layout=layout, bias="hqk") for layout in _LAYOUTS),
    Case(70, 70, dim=64, layout=heads_last, grad_layout=heads_last, left=9, right=0),
)
DISTANCES = table(
    *(Case(9, 11, distance=over) for over in ("", "h", "b", "bh")),
    *(Case(queries, keys, distance="h") for queries, keys in ((1, 1), (1, 9), (9, 1), (33, 70), (70, 33))),
    *(Case(queries, 0, distance="h") for queries in (0, 1, 5)),
    Case(0, 7, distance="bh"),
    Case(batch=0, distance="h"),
    Case(9, 11, distance="h", extras_dtype=torch.float32),
    Case(300, 500, batch=1, distance="h"),
    Case(130, 700, heads=1, distance="", left=200, right=20, offset=500),
    Case(70, 130, heads=4, kv_heads=2, distance="h", causal=True, value_dim=5),
    Case(70, 130, heads=4, kv_heads=1, distance="b", bias="hqk", softcap=3.0, factor=4.0),
    Case(33, 70, distance="bh", bias="bk", mask="bqk", lost=True, padding=True, sinks=True, lse_grad=True),
    Case(70, 70, distance="h", left=9, right=3, global_tokens=2),
    Case(70, 70, distance="h", left=3, right=3, dilation=3, padding=True, lost=True),
    Case(90, 40, distance="", left=7, right=3, offset=-20, global_mask=True, causal=True),
    Case(33, 70, distance="h", dropout=0.3, layout=heads_last, grad_layout=heads_last),
    Case(9, 11, distance="h", shift=-200.0, lse_grad=True),
    Case(9, 11, distance="bh", dropout=1.0),
)
CASES = SIZES | EMPTY | PATTERNS | MASKS | SCORES | LAYOUTS | DISTANCES
SOME = table(
    Case(33, 35, causal=True, heads=4, kv_heads=2),
    Case(33, 35, value_dim=5, bias="hqk", left=6, right=3),
    Case(33, 35, mask="bqk", lost=True, padding=True, sinks=True, lse_grad=True, softcap=4.0),
    Case(33, 35, dropout=0.3, bias="bk", layout=heads_last, grad_layout=heads_last),
    Case(33, 35, distance="h", value_dim=5, left=9, right=9, padding=True),
)
# Every remainder of both lengths to 64, in some order, below and above one tile.
RESIDUES = [
    Case(64 * (residue % 3 == 0) + residue, 64 * (residue % 2) + (37 * residue + 11) % 64, batch=1, heads=1)
    for residue in range(64)
]


@lru_cache(maxsize=512)
def answers(case: Case, dtype: torch.dtype) -> Answers:
    return answers_to(case.operands(dtype))


def shows_gradients(case: Case) -> bool:
    """Whether a case has any gradient that is not zero."""
    sees = case.keys > 0 and case.dropout < 1 and not (case.lost and case.queries == 1)
    return bool(case.batch and case.queries) and (sees or (case.sinks and case.lse_grad))


# ------------------------------------------------------------------------------------ backends


OPERATORS = {"forward": attention.FORWARD, "backward": attention.BACKWARD, "weights": attention.WEIGHTS}


class Attentions(Kernels):
    """A backend of the attention operators."""

    def need(self, operands: Operands, *passes: str) -> None:
        """Skip, quoting the refusals, where the backend does not compute this call."""
        bias_grad = operands.extras.bias is not None
        call = describe(*operands[:5], True, bias_grad)
        for op in [OPERATORS[name] for name in passes or ("forward", "backward")]:
            if reasons := list(backend_of(op, self.name).refusals(call)):
                pytest.skip("; ".join(reasons))

    def forward(self, operands: Operands) -> tuple[Tensor, Tensor]:
        return backend_of(attention.FORWARD, self.name).run(*operands[:5])

    def backward(self, operands: Operands, out: Tensor, lse: Tensor, needs: Sequence[bool]):
        given = operands.grad_out, operands.grad_lse, *operands[:3], out, lse, *operands[3:5]
        return backend_of(attention.BACKWARD, self.name).run(*given, needs)

    def run(self, operands: Operands, needs: Sequence[bool] | None = None) -> dict[str, Tensor | None]:
        """Forward and backward by the canonical signatures."""
        needs = operands.needs if needs is None else needs
        results = self.forward(operands)
        gradients = self.backward(operands, *results, needs)
        assert [each is not None for each in gradients] == list(needs)
        return dict(zip((*RESULTS, *GRADIENTS), (*results, *gradients), strict=True))

    def weights(self, operands: Operands, lse: Tensor, mean: bool) -> Tensor:
        run = backend_of(attention.WEIGHTS, self.name).run
        return run(operands.query, operands.key, lse, operands.extras, operands.settings, mean)


NATIVE = [Attentions("cpu", name) for name in hardware.CPU_INSTRUCTION_SETS]
EVERY_ATTENTION = [*NATIVE, Attentions("torch"), Attentions("reference")]
every_attention = pytest.mark.parametrize("backend", EVERY_ATTENTION, ids=str)
native_attention = pytest.mark.parametrize("backend", NATIVE, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def cases(table: dict[str, Case]):
    return pytest.mark.parametrize("case", table.values(), ids=table)


def prove(backend: Attentions, case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Run a case, hold every result to the rule and to the operator's shapes and dtypes."""
    operands = case.operands(dtype)
    backend.need(operands)
    results = backend.run(operands)
    hold(results, answers(case, dtype))
    assert results["lse"].dtype == torch.float32 and results["lse"].is_contiguous()
    return results

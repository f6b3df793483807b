"""Attention measured: how a case is built, and its products beside torch.mm's rate."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.attention_blocks import block_twins, output_of, source_shape
from benchmarks.attention_cases import (
    BIAS,
    CONTEXT,
    DENSE,
    DROPOUT,
    FLEX,
    KERNELS,
    LENGTHS,
    MAPS,
    MODULES,
    OPERATOR,
    PIECE,
    PIECES,
    SHORTEST,
    STOCK,
    SWIN,
    UNMASKED,
    WEIGHTS,
    AttentionCase,
)
from benchmarks.attention_modules import (
    SDPA_KERNELS,
    AmongAdditions,
    Flex,
    Formula,
    InContext,
    InPieces,
    Ours,
    Padded,
    Stock,
    Unpadded,
)
from benchmarks.benchmark import DTYPES, Benchmark, Call
from benchmarks.cuda import trial_medians
from benchmarks.suites import Absent, reason_of
from benchmarks.twins import Twins, call_of

# Tokens of the least work, where two are too few: a Swin's window of two by two, unequal lengths.
SMALLEST = {SWIN: 4, LENGTHS: SHORTEST}


def opponent(case: AttentionCase, device: str) -> nn.Module:
    """What stands on the stock side of an operator's case."""
    if case.against == UNMASKED:
        return Ours(replace(case, form=OPERATOR), device)
    if case.against == PIECES:
        return InPieces(Ours(replace(case, queries=PIECE), device), PIECE)
    if case.against == FLEX:
        return Flex(case, device)
    if case.form == LENGTHS:
        return Padded(case, device)
    if case.form == CONTEXT:
        return AmongAdditions()
    return Stock(case, device, case.against.removeprefix("SDPA ") if case.against in KERNELS else None)


def present_opponent(case: AttentionCase, device: str, inputs: tuple[Tensor, ...]) -> nn.Module:
    """The opponent, called once where that may fail for want of a compiler, or of a kernel for the case.

    Raises Absent when it does.
    """
    if case.against not in (FLEX, *KERNELS):
        return opponent(case, device)
    try:
        module = opponent(case, device)
        with torch.no_grad():
            module(*inputs)
    except Exception as error:
        raise Absent(f"{case.against}: {reason_of(error)}") from error
    return module


def our_side(case: AttentionCase, device: str) -> nn.Module:
    """What stands against it."""
    if case.form == CONTEXT:
        return InContext()
    return Unpadded(case, device) if case.form == LENGTHS else Ours(case, device)


def operator_twins(case: AttentionCase, device: str) -> Twins:
    def drawn(heads: int, rows: int, columns: int, batch: int = case.batch) -> Tensor:
        return torch.randn(batch, heads, rows, columns, device=device, dtype=DTYPES[case.dtype])

    named = packed(case, device) or {
        "query": drawn(case.heads, case.queries, case.head_dim),
        "key": drawn(case.kv_head_count, case.key_count, case.head_dim),
        "value": drawn(case.kv_head_count, case.key_count, case.value_size),
    }
    if case.form == BIAS:
        named["bias"] = drawn(case.heads, case.queries, case.key_count, batch=1)
    inputs = tuple(each.requires_grad_() for each in named.values())
    # torch draws other random numbers than we do, and some opponents have an easier problem.
    differs = case.against in (DENSE, PIECES, UNMASKED) or case.form == DROPOUT
    is_packed = case.form == LENGTHS
    return Twins(
        present_opponent(case, device, inputs),
        our_side(case, device),
        inputs,
        torch.randn_like(inputs[0]) if is_packed else drawn(case.heads, case.queries, case.value_size),
        ("output",),
        lambda module, inputs: (module(*inputs),),
        tuple(named),
        truth=None if is_packed else Formula(case, device),
        differs=differs,
    )


def packed(case: AttentionCase, device: str) -> dict[str, Tensor]:
    """Query, key and value of sequences of unequal length; nothing where the case has none."""
    if case.form != LENGTHS:
        return {}
    shape = sum(case.lengths), case.heads, case.head_dim
    names = "query", "key", "value"
    return {name: torch.randn(shape, device=device, dtype=DTYPES[case.dtype]) for name in names}


def module_twins(case: AttentionCase, device: str) -> Twins:
    stock, ours = block_twins(case, device)
    made = {"device": device, "dtype": DTYPES[case.dtype]}
    source, cotangent = (torch.randn(source_shape(case), **made) for _ in range(2))
    outputs = ("output", "weights") if case.form in (WEIGHTS, MAPS) else ("output",)
    inputs = (source.requires_grad_(),)
    return Twins(
        stock, ours, inputs, cotangent, outputs, lambda module, inputs: output_of(case, module, *inputs)
    )


def build(case: AttentionCase, device: str) -> Twins:
    """What is timed, the inputs and a dense cotangent, from a fixed seed."""
    torch.manual_seed(0)
    return module_twins(case, device) if case.form in MODULES else operator_twins(case, device)


def two_tokens(case: AttentionCase) -> AttentionCase:
    """The same kind of call with next to no work: one sequence of a few tokens, against torch's operator."""
    grouped = {} if case.kv_heads is None else {"kv_heads": 1}
    few = replace(
        case,
        batch=1,
        heads=case.heads // case.kv_head_count,
        queries=SMALLEST.get(case.form, min(case.queries, 2)),
        head_dim=8,
        keys=None if case.keys is None else 2,
        value_dim=None if case.value_dim is None else 4,
        against=STOCK,
        goals={},
    )
    return replace(few, **grouped)


class AttentionBenchmark(Benchmark):
    """Rows with the rate of the products over visible pairs as a share of torch.mm's."""

    def build(self, case: AttentionCase) -> Twins:
        return build(case, self.device)

    def tiny(self, case: AttentionCase) -> AttentionCase:
        return two_tokens(case)

    def figures(
        self, case: AttentionCase, pass_name: str, ours_ms: float, attained: dict[str, float]
    ) -> dict:
        figures = {"matmul_share": attained["gflop_per_s"] / self.product_rate(case)}
        if case.queries == 1:
            figures["copy_share"] = attained["gb_per_s"] / self.copy_speed.beyond_cache()
        if case.against == UNMASKED:
            figures["opponent_share"] = 1.0
        if case.against == PIECES:
            pieces = case.queries // PIECE * replace(case, queries=PIECE).visible_pairs
            figures["opponent_share"] = pieces / case.visible_pairs
        return figures

    def stock_call(self, pass_name: str, twins: Twins) -> tuple[Call, str]:
        """torch's operator on its fastest kernel on a GPU, where the case names none."""
        call, kernel = super().stock_call(pass_name, twins)
        if not isinstance(twins.stock, Stock):
            return call, kernel
        if self.device != "cuda" or twins.stock.kernel:
            return call, twins.stock.kernel or kernel

        def under(kernel: str) -> Call:
            stock = copy.copy(twins.stock)
            stock.kernel = kernel
            return call_of(pass_name, twins, stock)

        medians = trial_medians(under, SDPA_KERNELS, self.timer)
        best = min(medians, key=medians.__getitem__, default=None)
        return (under(best), best) if best else (call, kernel)

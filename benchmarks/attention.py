"""Attention measured: how a case is built, its products beside torch.mm's rate, and its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from benchmarks.benchmark import DTYPES, Benchmark
from benchmarks.copy_speed import CopySpeed
from benchmarks.cuda import trial_medians
from benchmarks.matmul_speed import MatmulSpeed
from benchmarks.peak_memory import peak_bytes
from benchmarks.suites import Absent
from benchmarks.twins import Twins, call_of

MIB = 1 << 20


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
        reason = next(iter(str(error).strip().splitlines()), "")
        raise Absent(f"{case.against}: {type(error).__name__}: {reason}") from error
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


class AttentionBenchmark(Benchmark):
    """Rows with the rate of the products over visible pairs, its share of torch.mm's, and the memory."""

    def __init__(self, device: str, budget_seconds: float, versus: str = "eager") -> None:
        super().__init__(device, budget_seconds, versus)
        self.matmul = MatmulSpeed(device, self.timer)
        self.copy_speed = CopySpeed(device, self.timer)

    def build(self, case: AttentionCase) -> Twins:
        return build(case, self.device)

    def ceilings(self) -> dict:
        return {f"matmul_{name}_gflop_per_s": self.matmul.of(DTYPES[name]) for name in ("fp32", "bf16")}

    def row(self, case: AttentionCase, pass_name: str, twins: Twins, errors: dict, backends: dict) -> dict:
        row = super().row(case, pass_name, twins, errors, backends)
        return row | {"peak_mib": self.peaks(pass_name, twins)}

    def peaks(self, pass_name: str, twins: Twins) -> dict[str, float]:
        """The most MiB that a call of each side allocates."""
        with torch.set_grad_enabled(pass_name != "fwd"):
            calls = {side: call_of(pass_name, twins, getattr(twins, side)) for side in ("stock", "ours")}
            return {side: peak_bytes(call, self.device) / MIB for side, call in calls.items()}

    def figures(self, case: AttentionCase, pass_name: str, ours_ms: float) -> dict:
        gflop_per_s = case.products(pass_name) / (ours_ms * 1e-3) / 1e9
        figures = {
            "gflop_per_s": gflop_per_s,
            "matmul_share": gflop_per_s / self.matmul.of(self.ceiling(case)),
        }
        if case.queries == 1:
            gb_per_s = case.minimum_bytes / (ours_ms * 1e-3) / 1e9
            figures["copy_share"] = gb_per_s / self.copy_speed.beyond_cache()
        if case.against == UNMASKED:
            figures["opponent_share"] = 1.0
        if case.against == PIECES:
            pieces = case.queries // PIECE * replace(case, queries=PIECE).visible_pairs
            figures["opponent_share"] = pieces / case.visible_pairs
        return figures

    def ceiling(self, case: AttentionCase) -> torch.dtype:
        """The dtype whose products bound the case: on a CPU, fp16 is computed in fp32."""
        return DTYPES["fp32" if (self.device, case.dtype) == ("cpu", "fp16") else case.dtype]

    def stock_call(self, pass_name: str, twins: Twins) -> tuple[Callable[[], object], str]:
        """torch's operator on its fastest kernel on a GPU, where the case names none.

        Of what stands on the stock side, only torch's operator and modules are ever compiled.
        """
        if isinstance(twins.stock, (Flex, Ours, InPieces)):
            return call_of(pass_name, twins, twins.stock), "auto"
        call, kernel = super().stock_call(pass_name, twins)
        if not isinstance(twins.stock, Stock) or self.versus != "eager":
            return call, kernel
        if self.device != "cuda" or twins.stock.kernel:
            return call, twins.stock.kernel or kernel

        def under(kernel: str) -> Callable[[], object]:
            stock = copy.copy(twins.stock)
            stock.kernel = kernel
            return call_of(pass_name, twins, stock)

        medians = trial_medians(under, SDPA_KERNELS, self.timer)
        best = min(medians, key=medians.__getitem__, default=None)
        return (under(best), best) if best else (call, kernel)

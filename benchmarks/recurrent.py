"""Recurrent layers measured: how a case is built, its time a step, its products beside torch.mm's rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks.benchmark import DTYPES, Benchmark
from benchmarks.measure import spread
from benchmarks.recurrent_cases import (
    CELL,
    EXPANDED,
    PACKED,
    SEQUENCE,
    SHORTEST_PACKED,
    STREAMING,
    RecurrentCase,
)
from benchmarks.twins import Twins, call_of, twin_modules

LAYERS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}


class CellLoop(nn.Module):
    """A cell called once a step from zero states, as a model with a step of its own must call it."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """(T, B, I) -> the h of every step (T, B, H), and the last state."""
        states, outputs = None, []
        for step in input:
            states = self.cell(step, states)
            outputs.append(states[0] if isinstance(states, tuple) else states)
        return torch.stack(outputs), states


def make_module(case: RecurrentCase, device: str) -> nn.Module:
    settings = {"device": device, "dtype": DTYPES[case.dtype]}
    if case.form == CELL:
        return CellLoop(CELLS[case.mode](case.input_size, case.hidden, **settings))
    if case.proj:
        settings["proj_size"] = case.proj
    return LAYERS[case.mode](
        case.input_size,
        case.hidden,
        num_layers=case.layers,
        bidirectional=case.directions == 2,
        **settings,
    )


def initial_states(case: RecurrentCase, device: str) -> tuple[Tensor, ...]:
    """Random h0, and c0 for an LSTM, where the case streams; else nothing."""
    if case.form != STREAMING:
        return ()
    widths = (case.proj or case.hidden, case.hidden)[: 2 if case.mode == "LSTM" else 1]
    places = case.layers * case.directions
    dtype = DTYPES[case.dtype]
    return tuple(torch.randn(places, case.batch, width, device=device, dtype=dtype) for width in widths)


def packed_in_shuffled_order(padded: Tensor, lengths: tuple[int, ...]) -> PackedSequence:
    """`padded` (T, B, I) packed, its sequences not sorted by length."""
    order = torch.randperm(len(lengths))
    return pack_padded_sequence(padded, torch.tensor(lengths)[order], enforce_sorted=False)


def forward_with(packing: tuple) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A forward over (input, *initial states); `packing`: what follows data in a PackedSequence, or ()."""

    def forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        source, *states = inputs
        arguments = (PackedSequence(source, *packing) if packing else source,)
        if states:
            arguments += (tuple(states) if len(states) == 2 else states[0],)
        output, last = module(*arguments)
        last = last if isinstance(last, tuple) else (last,)
        return output.data if packing else output, *last

    return forward


def build(case: RecurrentCase, device: str) -> Twins:
    """Modules, inputs and the cotangent of the output, from a fixed seed."""
    torch.manual_seed(0)
    stock, ours = twin_modules(lambda: make_module(case, device))
    source = torch.randn(case.steps, case.batch, case.input_size, device=device, dtype=DTYPES[case.dtype])
    packing = ()
    if case.form == PACKED:
        source, *packing = packed_in_shuffled_order(source, case.lengths)
    inputs = (source.requires_grad_(), *initial_states(case, device))
    forward = forward_with(tuple(packing))
    with torch.no_grad():
        output = forward(stock, inputs)[0]
    cotangent = torch.randn_like(output)
    if case.form == EXPANDED:
        cotangent = torch.ones_like(output[(0,) * output.dim()]).expand_as(output)
    names = ("output", "h_n", "c_n")[: 3 if case.mode == "LSTM" else 2]
    return Twins(stock, ours, inputs, cotangent, names, forward)


def one_step(case: RecurrentCase) -> RecurrentCase:
    """The same kind of module with one unit over one step; a cell's loop keeps its steps, each a call."""
    proj = min(case.proj, 1)
    tiny = replace(case, batch=1, hidden=1 + proj, input=1, proj=proj, goals={})
    if case.form == CELL:
        return tiny
    return replace(tiny, steps=SHORTEST_PACKED if case.form == PACKED else 1)


class RecurrentBenchmark(Benchmark):
    """Rows with the time a step, and the rate of the matrix products as a share of what torch.mm reaches."""

    def build(self, case: RecurrentCase) -> Twins:
        return build(case, self.device)

    def tiny(self, case: RecurrentCase) -> RecurrentCase:
        return one_step(case)

    def figures(
        self, case: RecurrentCase, pass_name: str, ours_ms: float, attained: dict[str, float]
    ) -> dict:
        figures = {
            "us_a_step": ours_ms * 1e3 / case.steps,
            "matmul_share": attained["gflop_per_s"] / self.product_rate(case),
        }
        if case.form == PACKED:
            figures["of_padded"] = self.of_padded(case, pass_name)
        return figures

    def of_padded(self, case: RecurrentCase, pass_name: str) -> dict:
        """Each side's time on packed sequences over its own on a padded batch of as many steps, paired."""
        packed, padded = self.build(case), self.build(replace(case, form=SEQUENCE))
        ratios = {}
        with torch.set_grad_enabled(pass_name != "fwd"):
            for side in ("stock", "ours"):
                twins = {"packed": packed, "padded": padded}
                calls = {name: call_of(pass_name, each, getattr(each, side)) for name, each in twins.items()}
                ratios[side] = spread(self.in_turn(calls).ratios("packed", "padded"))
        return ratios

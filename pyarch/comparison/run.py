"""The whole comparison: every architecture on every length."""

from __future__ import annotations

from itertools import product

import torch
from torch import nn

from pyarch.comparison.architectures import Architecture, architectures, swapped
from pyarch.comparison.measure import REFUSALS, Row, measure
from pyarch.comparison.question import Question
from pyarch.comparison.reach import Reach, reach_of
from pyarch.comparison.results import Compared, Comparison
from pyarch.demo import machine_of
from pyarch.report import with_progress


def compare(question: Question) -> Comparison:
    """Measure every architecture on every length, shorter lengths first, and show the progress on stderr."""
    asked = architectures(question)
    turns = list(product(question.lengths, asked))
    names = [f"{each.name}, {length} tokens" for length, each in turns]
    rows: dict[str, list[Row]] = {each.name: [] for each in asked}
    for (length, each), _ in zip(turns, with_progress(names), strict=True):
        rows[each.name].append(measure(each, question, length))
    compared = tuple(_compared(each, question, tuple(rows[each.name])) for each in asked)
    return Comparison(question, machine_of(question.device), compared)


def _compared(architecture: Architecture, question: Question, rows: tuple[Row, ...]) -> Compared:
    said = architecture.name, architecture.family, architecture.note
    torch.manual_seed(0)
    try:
        module = architecture.build()
    except ValueError:
        return Compared(*said, None, (None,) * len(rows), rows, None)
    parameters = sum(each.numel() for each in module.parameters())
    flop = tuple(question.batch * module.flop(row.length) for row in rows)
    return Compared(*said, parameters, flop, rows, _reach(module, question, rows))


def _reach(module: nn.Module, question: Question, rows: tuple[Row, ...]) -> Reach | None:
    """Of the stock module, or where only pyarch runs the longest sequence, of the swapped one."""
    ran = [row for row in rows if row.stock.step is not None or row.pyarch.step is not None]
    if not ran:
        return None
    if ran[-1].stock.step is None:
        module = swapped(module)
    try:
        return reach_of(module.to(question.device, question.dtype), question, ran[-1].length)
    except REFUSALS:
        return None

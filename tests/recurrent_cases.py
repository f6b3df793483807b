"""Recurrent layers at the operator's contract: cases as data, the backends of this machine, torch's answers.

A result is a dict: "output", "h_n", "c_n", "gates", "cells", then "grad input", "grad h0", "grad c0" and one
"grad weight <index>" for each of the flat weights; None where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pyarch import hardware
from pyarch.ops import recurrent
from pyarch.ops.recurrent_torch import run_stock
from pyarch.reference import recurrent as reference
from tests.compare import check, error
from tests.conv_cases import Kernels, backend_of, contiguous, expanded, misaligned, sliced
from tests.recurrent_models import OUTPUTS, batch_major, features_first, hold

MODES = tuple(reference.GATES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESIDUALS = ("gates", "cells")


def one_row_for_all(tensor: Tensor) -> Tensor:
    """Dimension 1 expanded from its first row."""
    return tensor[:, :1].expand(tensor.shape)


# ------------------------------------------------------------------------------------ cases


class Operands(NamedTuple):
    """What a forward takes, and random gradients of its results; c0 and its gradient only for an lstm."""

    input: Tensor
    h0: Tensor
    c0: Tensor | None
    weights: list[Tensor]
    batch_sizes: Tensor | None
    grads: tuple[Tensor | None, ...]

    @property
    def flat(self) -> list[Tensor | None]:
        return [self.input, self.h0, self.c0, *self.weights]

    def as_dtype(self, dtype: torch.dtype) -> Operands:
        """The same numbers, contiguous, in another dtype."""

        def cast(tensor):
            return None if tensor is None else tensor.to(dtype).contiguous()

        return Operands(
            *map(cast, self[:3]),
            [cast(each) for each in self.weights],
            self.batch_sizes,
            tuple(map(cast, self.grads)),
        )


@dataclass(frozen=True)
class Case:
    """One layer; `lengths`, falling, makes it packed and is its batch; `factor` scales the input."""

    mode: str
    steps: int = 5
    batch: int = 3
    inputs: int = 4
    hidden: int = 6
    proj: int = 0
    directions: int = 1
    bias: bool = True
    lengths: tuple[int, ...] | None = None
    layout: Callable[[Tensor], Tensor] = contiguous
    state_layout: Callable[[Tensor], Tensor] = contiguous
    grad_layout: Callable[[Tensor], Tensor] = contiguous
    factor: float = 1.0

    @property
    def rows(self) -> tuple[int, ...]:
        return (self.steps, self.batch) if self.lengths is None else (sum(self.lengths),)

    @property
    def weight_shapes(self) -> list[tuple[int, ...]]:
        gates, width = reference.GATES[self.mode] * self.hidden, self.proj or self.hidden
        own = [(gates, self.inputs), (gates, width)]
        own += [(gates,)] * 2 if self.bias else []
        own += [(self.proj, self.hidden)] if self.proj else []
        return own * self.directions

    def operands(self, dtype: torch.dtype) -> Operands:
        batch, width = len(self.lengths or ()) or self.batch, self.proj or self.hidden

        def drawn(layout, *shape):
            return layout(torch.randn(shape).to(dtype))

        is_lstm = self.mode == "lstm"
        bound = self.hidden**-0.5
        states = [(self.directions, batch, width), (self.directions, batch, self.hidden)][: 1 + is_lstm]
        nothing = [] if is_lstm else [None]
        return Operands(
            self.layout((self.factor * torch.randn(*self.rows, self.inputs)).to(dtype)),
            *[drawn(self.state_layout, *shape) for shape in states],
            *nothing,
            [torch.empty(shape).uniform_(-bound, bound).to(dtype) for shape in self.weight_shapes],
            None if self.lengths is None else batch_sizes_of(self.lengths),
            (
                drawn(self.grad_layout, *self.rows, self.directions * width),
                *[drawn(self.grad_layout, *shape) for shape in states],
                *nothing,
            ),
        )


def batch_sizes_of(lengths: Sequence[int]) -> Tensor:
    """How many sequences are alive at each step."""
    return torch.tensor([sum(length > step for length in lengths) for step in range(max(lengths))])


def _of(case: Case) -> str:
    """What differs from the defaults, as a test's name."""
    default = Case(case.mode)
    parts = [case.mode]
    for name in case.__dataclass_fields__:
        value = getattr(case, name)
        if value != getattr(default, name):
            parts.append(f"{name} {getattr(value, '__name__', value)}")
    return ", ".join(parts)


def every_mode(**settings) -> list[Case]:
    return [Case(mode, **settings) for mode in MODES]


_SIZES = [
    (1, 1, 1, 1),
    (2, 3, 4, 5),
    (7, 1, 3, 31),
    (7, 17, 5, 33),
    (2, 3, 64, 64),
    (1, 17, 9, 64),
    (7, 0, 4, 5),
]
_LENGTHS = [(7, 5, 5, 2, 1), (1, 1, 1), (4, 4, 4), (6,), (9, *[3] * 16)]
_LAYOUTS = [batch_major, features_first, sliced, misaligned, expanded]
CASES = {
    _of(case): case
    for case in (
        *(
            case
            for steps, batch, inputs, hidden in _SIZES
            for case in every_mode(steps=steps, batch=batch, inputs=inputs, hidden=hidden)
        ),
        *every_mode(directions=2),
        *every_mode(bias=False),
        *every_mode(directions=2, bias=False, batch=17, hidden=33),
        *(
            Case("lstm", proj=proj, directions=directions, bias=bias)
            for proj in (1, 5)
            for directions in (1, 2)
            for bias in (True, False)
        ),
        Case("lstm", proj=33, hidden=64, batch=17, directions=2),
        *(
            case
            for lengths in _LENGTHS
            for directions in (1, 2)
            for case in every_mode(lengths=lengths, directions=directions, hidden=9)
        ),
        Case("lstm", lengths=_LENGTHS[0], directions=2, proj=3),
        Case("lstm", lengths=_LENGTHS[0], directions=2, bias=False),
        *(case for layout in _LAYOUTS for case in every_mode(layout=layout, grad_layout=layout)),
        *every_mode(state_layout=one_row_for_all, directions=2),
        *every_mode(state_layout=features_first, lengths=_LENGTHS[0]),
        *every_mode(factor=100.0, steps=9),
        *every_mode(steps=9, batch=17, directions=2),
    )
}
SOME = {
    _of(case): case
    for case in (
        *every_mode(directions=2, batch=17, hidden=33),
        *every_mode(lengths=_LENGTHS[0], directions=2),
        Case("lstm", proj=5, directions=2),
    )
}


# ------------------------------------------------------------------------------------ torch's answers


def by_torch(
    case: Case, operands: Operands, reached: Sequence[bool] = (True, True, True)
) -> dict[str, Tensor | None]:
    """Results and gradients of torch's own operator through its own autograd, in the operands' dtype."""
    leaves = [None if each is None else each.detach().requires_grad_() for each in operands.flat]
    hx = [each for each in leaves[1:3] if each is not None]
    settings = case.bias, 1, 0.0, True, case.directions == 2
    results = run_stock(case.mode, leaves[0], hx, leaves[3:], operands.batch_sizes, *settings)
    arriving = [
        (result, grad)
        for result, grad, wanted in zip(results, operands.grads, reached, strict=True)
        if wanted and grad is not None
    ]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in arriving],
            [each for each in leaves if each is not None],
            [grad.contiguous() for _, grad in arriving],
            allow_unused=True,
        )
    )
    outputs = {
        name: None if each is None else each.detach() for name, each in zip(OUTPUTS, results, strict=True)
    }
    return outputs | named_gradients([None if each is None else next(found) for each in leaves])


def named_gradients(flat: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    names = ("input", "h0", "c0", *(f"weight {index}" for index in range(len(flat) - 3)))
    return {f"grad {name}": each for name, each in zip(names, flat, strict=True)}


# ------------------------------------------------------------------------------------ backends


class Layers(Kernels):
    """A backend of the recurrent operator."""

    def run(
        self,
        case: Case,
        operands: Operands,
        needs: Sequence[bool] | None = None,
        reached: Sequence[bool] = (True, True, True),
    ) -> dict[str, Tensor | None]:
        """Forward and backward by the canonical signatures."""
        if needs is None:
            needs = [each is not None for each in operands.flat]
        inputs = operands[:5]
        results = backend_of(recurrent.FORWARD, self.name).run(case.mode, *inputs, True)
        output, _, _, gates, cells = results
        grads = [grad if wanted else None for grad, wanted in zip(operands.grads, reached, strict=True)]
        *states, of_weights = backend_of(recurrent.BACKWARD, self.name).run(
            case.mode, *grads, *inputs, output, gates, cells, needs
        )
        gradients = named_gradients([*states, *of_weights])
        assert [each is not None for each in gradients.values()] == list(needs)
        return dict(zip((*OUTPUTS, *RESIDUALS), results, strict=True)) | gradients


NATIVE = [Layers("cpu", name) for name in hardware.CPU_INSTRUCTION_SETS]
EVERY_LAYERS = [*NATIVE, Layers("torch"), Layers("reference")]
every_layers = pytest.mark.parametrize("backend", EVERY_LAYERS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def cases(table: dict[str, Case]):
    return pytest.mark.parametrize("case", table.values(), ids=table)


# ------------------------------------------------------------------------------------ the checks


def hold_all(case: Case, operands: Operands, results: dict[str, Tensor | None], **reached) -> None:
    """Hold whatever results there are to the tolerance rule; those that are None were not asked for.

    On the few elements of a case torch may be right by luck, so its typical relative error counts as well,
    and for gradients one float32 rounding of what arrives, grown with the root of the rows that are summed:
    a saturated gate's derivative is a difference to 1, rounded as 1 is.
    """
    stock = by_torch(case, operands, **reached)
    truth = by_torch(case, operands.as_dtype(torch.float64), **reached)
    if case.mode == "rnn_relu":
        truth |= gradients_at(case, operands, results, **reached)
    asked = [name for name, each in results.items() if each is not None and name not in RESIDUALS]
    noise = {}
    for group in ([n for n in given(truth) if n in OUTPUTS], [n for n in given(truth) if n not in OUTPUTS]):
        noise |= dict.fromkeys(group, median(_relative_error(stock[name], truth[name]) for name in group))
    rounding = torch.finfo(torch.float32).eps * operands.input.shape[:-1].numel() ** 0.5
    arriving = max(_largest(grad) for grad in operands.grads if grad is not None)
    for name in noise.keys() - set(OUTPUTS):
        noise[name] = max(noise[name], rounding * arriving / (_largest(truth[name]) or 1.0))
    hold(*({name: answers[name] for name in asked} for answers in (results, stock, truth)), noise)
    hold_residuals(case, operands, results, max(noise[name] for name in OUTPUTS if name in noise))
    if operands.h0.numel():
        assert any(each.abs().nan_to_num().max() > 0 for name, each in given(truth).items() if "grad" in name)


def gradients_at(
    case: Case, operands: Operands, results, reached=(True, True, True)
) -> dict[str, Tensor | None]:
    """Float64 gradients at the output that was computed, for a relu that lies within rounding of its kink."""
    wide = operands.as_dtype(torch.float64)
    grads = [grad if wanted else None for grad, wanted in zip(wide.grads, reached, strict=True)]
    needs = [each is not None for each in operands.flat]
    saved = results["output"].double(), results["gates"], results["cells"]
    *states, of_weights = reference.backward(case.mode, *grads, *wide[:5], *saved, needs)
    return named_gradients([*states, *of_weights])


def hold_residuals(case: Case, operands: Operands, results, noise: float) -> None:
    """Gates and cells, of which torch has none to compare: its float32 ones, rounded, stand in."""
    exact = reference.forward(case.mode, *operands.as_dtype(torch.float64)[:5], True)[3:]
    wide = reference.forward(case.mode, *operands.as_dtype(torch.float32)[:5], True)[3:]
    for name, true, near in zip(RESIDUALS, exact, wide, strict=True):
        if true.dim() > 1:
            near = near.to(operands.input.dtype) if name == "gates" else near
            check(name, results[name], near, true, noise=noise)


def _relative_error(result: Tensor, truth: Tensor) -> float:
    return error(result, truth) / (_largest(truth) or 1.0)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def given(results: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: each for name, each in results.items() if each is not None}


def prove(backend: Layers, case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Run a case, hold every result to the rule and to the operator's shapes and layouts."""
    operands = case.operands(dtype)
    results = backend.run(case, operands)
    hold_all(case, operands, results)
    rows = operands.input.shape[:-1].numel()
    is_lstm = case.mode == "lstm"
    gates = (case.directions, rows, 4 * case.hidden) if reference.SAVED_BLOCKS[case.mode] else (0,)
    assert results["gates"].shape == gates
    assert results["cells"].shape == ((case.directions, rows, case.hidden) if is_lstm else (0,))
    assert all(each.is_contiguous() for each in given(results).values())
    return results

"""The reference of the recurrent layers: torch's meaning, and written-out gradients that are autograd's."""

from __future__ import annotations

import pytest
import torch

from pyarch.reference import recurrent as reference
from tests.recurrent_cases import CASES, Case, Layers, batch_sizes_of, by_torch, cases, every_mode, given

OPERATOR = "recurrent"
pytestmark = pytest.mark.operator(OPERATOR, "reference")

# Small enough for numeric second derivatives.
_TINY = dict(steps=3, batch=2, inputs=2, hidden=2)
SMALL = {
    f"{case.mode}{note}": case
    for note, settings in {
        "": {},
        " bidirectional": {"directions": 2},
        " without bias": {"bias": False},
        " packed": {"lengths": (3, 1), "directions": 2},
    }.items()
    for case in every_mode(**_TINY | settings)
} | {
    "projection": Case("lstm", proj=1, **_TINY),
    "projection packed": Case("lstm", proj=1, directions=2, **_TINY | {"lengths": (3, 2)}),
}


def differentiable(case, dtype=torch.float64):
    """The forward as a function of its differentiable leaves only, the leaves, and the other operands."""
    operands = case.operands(dtype)
    leaves = [each.requires_grad_() for each in operands.flat if each is not None]

    def forward(input, h0, *rest):
        c0, weights = (rest[0], rest[1:]) if case.mode == "lstm" else (None, rest)
        results = reference.forward(case.mode, input, h0, c0, weights, operands.batch_sizes, False)[:3]
        return tuple(each for each in results if each is not None)

    return forward, leaves, operands


@cases(SMALL)
def test_recurrent_reference_forward_gradcheck(case):
    forward, leaves, _ = differentiable(case)
    assert torch.autograd.gradcheck(forward, leaves)


@cases(SMALL)
def test_recurrent_reference_forward_gradgradcheck(case):
    forward, leaves, _ = differentiable(case)
    assert torch.autograd.gradgradcheck(forward, leaves)


@cases(CASES)
def test_recurrent_reference_is_torchs(case):
    """Results and written-out gradients are torch's, and so autograd's of torch's operator."""
    operands = case.operands(torch.float64)
    ours = given(Layers("reference").run(case, operands))
    for name, theirs in given(by_torch(case, operands)).items():
        torch.testing.assert_close(ours[name], theirs, msg=lambda text, name=name: f"{name}: {text}")


@cases(CASES)
def test_recurrent_reference_backward_is_autograds(case):
    forward, leaves, operands = differentiable(case)
    grads = [grad for grad in operands.grads if grad is not None]
    expected = torch.autograd.grad(forward(*leaves), leaves, grads)
    with torch.no_grad():
        results = Layers("reference").run(case, operands)
    written = [each for name, each in given(results).items() if "grad" in name]
    for ours, autograds in zip(written, expected, strict=True):
        torch.testing.assert_close(ours, autograds)


@cases(CASES)
def test_recurrent_reference_makes_the_residuals_again(case):
    input, h0, c0, weights, batch_sizes, _ = case.operands(torch.float64)
    output, _, _, gates, cells = reference.forward(case.mode, input, h0, c0, weights, batch_sizes, True)
    again = reference.gates_of(case.mode, input, h0, weights, batch_sizes, output)
    torch.testing.assert_close(again, gates)
    if case.mode == "lstm":
        steps = reference.steps_of(input, batch_sizes)
        torch.testing.assert_close(reference.cells_of(gates, c0, steps), cells)


@pytest.mark.parametrize("mode", reference.GATES)
def test_recurrent_reference_steps_chained_are_the_layer(mode):
    case = Case(mode)
    input, h, c, weights, _, _ = case.operands(torch.float64)
    (direction,) = reference.split_directions(weights, 1)
    output, h_n, c_n, _, _ = reference.forward(mode, input, h, c, weights, None, False)
    h, c = h[0], None if c is None else c[0]
    for x, expected in zip(input, output, strict=True):
        input_side = torch.nn.functional.linear(x, direction.w_ih, direction.b_ih)
        h, c, _ = reference.step(mode, input_side, h, c, direction, torch.float64)
        torch.testing.assert_close(h, expected)
    torch.testing.assert_close(h, h_n[0])
    if mode == "lstm":
        torch.testing.assert_close(c, c_n[0])


@pytest.mark.parametrize("reverse", [False, True])
def test_recurrent_reference_states_before(reverse):
    """Lengths 3 and 1: rows 0, 1 of step 0, row 2 of step 1, row 3 of step 2; initial states -1 and -2."""
    steps = reference.steps_of(torch.zeros(4, 1), batch_sizes_of((3, 1)))
    states, initial = torch.arange(4.0).view(4, 1), torch.tensor([[-1.0], [-2.0]])
    before = reference.states_before(states, initial, steps, reverse)
    assert before.flatten().tolist() == ([2, -2, 3, -1] if reverse else [-1, -2, 0, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recurrent_reference_carries_the_cell_in_float32(dtype):
    """A thousand additions of 1/1024 to a cell, which 16 bits would lose once the cell is large."""
    steps, big = 1000, 60.0
    weights = [torch.zeros(4, 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype)]
    weights += [torch.tensor([big, big, 1 / 1024, big], dtype=dtype), torch.zeros(4, dtype=dtype)]
    input, state = torch.zeros(steps, 1, 1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype)
    _, _, c_n, _, cells = reference.forward("lstm", input, state, 8 * state, weights, None, True)
    expected = torch.tensor(8 + steps * torch.tensor(1 / 1024, dtype=dtype).item())
    torch.testing.assert_close(cells[0, -1, 0], expected, rtol=1e-5, atol=0)
    assert c_n.item() == expected.to(dtype).item()

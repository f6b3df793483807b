"""pyarch.nn's recurrent layers and cells give torch's values: sizes, flags, layouts, extremes, drift."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pyarch
from tests.conv_cases import expanded, misaligned, sliced
from tests.recurrent_models import (
    DTYPES,
    MODES,
    OUTPUTS,
    Problem,
    answers,
    batch_major,
    cases,
    drop_in,
    each_backend,
    each_dtype,
    each_mode,
    features_first,
    hold,
    in_every_mode,
    outcome,
    prove,
)

OPERATOR = "recurrent"


# ------------------------------------------------------------------------------------ sizes

SIZES = [
    *({"steps": steps} for steps in (1, 2, 37)),
    *({"batch": batch} for batch in (None, 0, 1, 15, 17, 129)),
    *({"hidden": hidden} for hidden in (1, 5, 31, 33, 100, 193)),
    # Our sums over the units run one after another, MKL's in several parts: over six seeds its error is
    # 1.2e-7 to 1.7e-7 of the largest output of an rnn, ours 3e-7 to 5e-7, with seed 0 a hundredth too much.
    {"hidden": 192, "seed": 1},
    *({"inputs": inputs} for inputs in (1, 3, 65)),
    {"steps": 1, "batch": 4, "inputs": 1, "hidden": 1},
]


@each_backend
@cases(
    *(problem for size in SIZES for problem in in_every_mode(**size)),
    # Seed 0 gives an LSTM whose lone output nearly cancels, where torch's error is a sample of one.
    *(Problem(mode, steps=1, batch=1, inputs=1, hidden=1, seed=1) for mode in ("lstm", "gru", "rnn_tanh")),
)
def test_recurrent_sizes(backend, problem):
    prove(problem, backend)


@each_backend
@cases(
    *(Problem(mode, steps=2, batch=2, hidden=hidden) for mode in ("lstm", "gru") for hidden in (768, 1025))
)
def test_recurrent_large_hidden(backend, problem):
    prove(problem, backend)


@each_backend
@cases(
    *(
        problem
        for dtype in (torch.bfloat16, torch.float16)
        for size in ({"batch": 17, "hidden": 33}, {"steps": 40, "batch": 1}, {"batch": None}, {"batch": 0})
        for problem in in_every_mode(dtype=dtype, **size)
    )
)
def test_recurrent_sizes_in_half_precision(backend, problem):
    prove(problem, backend)


# ------------------------------------------------------------------------------------ flags

FLAGS = [
    dict(bias=bias, bidirectional=both, layers=layers)
    for bias in (True, False)
    for both in (False, True)
    for layers in (1, 3)
]


@each_backend
@each_dtype
@cases(*(problem for flags in FLAGS for problem in in_every_mode(**flags)))
def test_recurrent_flags(backend, problem, dtype):
    prove(replace(problem, dtype=dtype), backend)


@each_backend
@each_dtype
@cases(*(Problem("lstm", proj=proj, **flags) for flags in FLAGS for proj in (1, 3)))
def test_recurrent_projection(backend, problem, dtype):
    prove(replace(problem, dtype=dtype), backend)


@each_backend
@cases(
    *in_every_mode(batch_first=True, layers=2, bidirectional=True),
    *in_every_mode(batch_first=True, batch=None),
    Problem("lstm", batch_first=True, proj=2),
)
def test_recurrent_batch_first(backend, problem):
    prove(problem, backend)


@each_backend
@cases(
    *(
        problem
        for state in ("none", "expanded")
        for problem in in_every_mode(state=state, layers=2, bidirectional=True)
    ),
    *in_every_mode(state="none", batch=None),
    Problem("lstm", state="expanded", proj=2),
    Problem("lstm", state="none", proj=2, batch=0),
)
def test_recurrent_initial_state(backend, problem):
    prove(problem, backend)


# ------------------------------------------------------------------------------------ cells


@each_backend
@each_dtype
@cases(
    *(
        problem
        for settings in (
            {},
            {"bias": False},
            {"batch": None},
            {"batch": 0},
            {"batch": 17, "hidden": 33},
            {"batch": 4, "hidden": 1, "inputs": 1},
            {"state": "none"},
            {"state": "expanded"},
            {"layout": sliced, "grad_layout": expanded},
            {"frozen": ("h0", "c0")},
            {"frozen": ("weight", "bias")},
        )
        for problem in in_every_mode(cell=True, **settings)
    ),
    Problem("lstm", cell=True, reached=("h_n",)),
    Problem("lstm", cell=True, reached=("c_n",)),
)
def test_recurrent_cells(backend, problem, dtype):
    prove(replace(problem, dtype=dtype), backend)


@each_backend
@each_mode
def test_recurrent_cells_chained_are_the_layer(backend, mode):
    """A loop over a cell, trained through its steps, agrees with torch's layer on the same weights."""
    problem = Problem(mode, steps=7)
    layer, one = problem.stock(), replace(problem, cell=True)
    cell = drop_in(one.stock_class)(problem.inputs, problem.hidden, **one.settings)
    cell.load_state_dict({name.removesuffix("_l0"): each for name, each in layer.state_dict().items()})
    input, *state = problem.arguments()
    hx = tuple(each[0] for each in state) if mode == "lstm" else state[0][0]
    outputs = []
    with pyarch.backend(backend):
        for step in input:
            hx = cell(step, hx)
            outputs.append(hx[0] if mode == "lstm" else hx)
        output = torch.stack(outputs)
        cotangent = torch.randn_like(output)
        mine = torch.autograd.grad(output, list(cell.parameters()), cotangent)
    theirs = layer(input, tuple(state) if mode == "lstm" else state[0])[0]
    torch.testing.assert_close(output, theirs, rtol=1e-5, atol=1e-6)
    for got, expected in zip(
        mine, torch.autograd.grad(theirs, list(layer.parameters()), cotangent), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------ which gradients


@each_backend
@cases(
    *(
        problem
        for reached in (("output",), ("h_n",), ("output", "h_n"))
        for problem in in_every_mode(reached=reached, layers=2, bidirectional=True)
    ),
    *(
        Problem("lstm", reached=reached, bidirectional=True, proj=proj, dtype=dtype)
        for reached in (("c_n",), ("h_n", "c_n"), ("output", "c_n"))
        for proj in (0, 3)
        for dtype in DTYPES[:2]
    ),
)
def test_recurrent_gradients_of_some_outputs(backend, problem):
    prove(problem, backend)


FROZEN = [
    ("input",),
    ("weight", "bias"),
    ("weight_hh",),
    ("weight_ih", "bias_ih"),
    ("bias",),
    ("h0", "c0"),
    ("input", "h0", "c0", "weight", "bias_ih"),
    ("_reverse", "weight_hr"),
    ("input", "h0", "c0", "weight", "bias"),
]


@each_backend
@cases(*(problem for frozen in FROZEN for problem in in_every_mode(frozen=frozen, bidirectional=True)))
def test_recurrent_frozen(backend, problem):
    prove(problem, backend)


@each_backend
@cases(
    *(
        Problem("lstm", proj=3, frozen=frozen, layers=2)
        for frozen in (*FROZEN, ("input", "h0", "weight", "bias"), ("input", "c0", "weight", "bias"))
    )
)
def test_recurrent_frozen_with_projection(backend, problem):
    prove(problem, backend)


# ------------------------------------------------------------------------------------ memory layouts


LAYOUTS = [batch_major, features_first, sliced, misaligned, expanded]


@each_backend
@cases(
    *(
        problem
        for layout in LAYOUTS
        for problem in in_every_mode(layout=layout, layers=2, bidirectional=True)
    ),
    *(Problem("gru", layout=layout, dtype=dtype) for layout in LAYOUTS for dtype in DTYPES[1:]),
)
def test_recurrent_input_layouts(backend, problem):
    prove(problem, backend)


@each_backend
@cases(
    *(
        problem
        for layout in LAYOUTS
        for problem in in_every_mode(grad_layout=layout, layers=2, bidirectional=True)
    ),
    *(Problem("lstm", grad_layout=layout, dtype=dtype) for layout in LAYOUTS for dtype in DTYPES[1:]),
)
def test_recurrent_gradient_layouts(backend, problem):
    prove(problem, backend)


@each_backend
@each_mode
def test_recurrent_sum_backward(backend, mode):
    """The gradient of a sum is one number expanded over every stride."""
    problem = Problem(mode, bidirectional=True)
    ours, stock = problem.ours(), problem.stock()
    input, *_ = problem.arguments()
    with pyarch.backend(backend):
        ours(input)[0].sum().backward()
    stock(input)[0].sum().backward()
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@each_backend
@cases(
    *(
        problem
        for settings in (
            {},
            {"layers": 2, "bidirectional": True},
            {"batch_first": True},
            {"batch": None},
            {"batch": 1},
            {"steps": 1},
            {"layout": batch_major},
            {"cell": True},
            {"cell": True, "batch": None},
        )
        for problem in in_every_mode(**settings)
    )
)
def test_recurrent_strides_are_torchs(backend, problem):
    """Of outputs and of the gradients of input and parameters."""
    with pyarch.backend(backend):
        mine = outcome(problem, problem.ours())
    theirs = outcome(problem, problem.stock())
    assert {name: each.stride() for name, each in mine.items()} == {
        name: each.stride() for name, each in theirs.items()
    }


# ------------------------------------------------------------------------------------ extreme values


def every_second_step(factor):
    """Scale steps 1, 3, 5, ... so that saturated gates stand between live ones."""

    def scaled(tensor):
        tensor[1::2] *= factor
        return tensor

    scaled.__name__ = f"steps scaled by {factor:g}"
    return scaled


@each_backend
@cases(
    *(
        problem
        for factor in (100.0, 1e4)
        for dtype in DTYPES
        for problem in in_every_mode(
            steps=9, change=every_second_step(factor), dtype=dtype, hidden=20, bidirectional=True, seed=1
        )
        if (factor, dtype, problem.mode) != (1e4, torch.float16, "rnn_relu")
    )
)
def test_recurrent_saturation(backend, problem):
    """Saturated gates give torch's gradients, never NaN. (1e4 in float16 overflows a relu, torch's too.)"""
    results = prove(problem, backend)
    assert all(each.isfinite().all() for each in results.values())


@each_backend
@pytest.mark.parametrize("value", [1e4, -1e4, 1e30])
@each_mode
def test_recurrent_every_gate_saturated(backend, mode, value):
    problem = Problem(
        mode,
        steps=1 if mode == "rnn_relu" else 5,
        inputs=1,
        bidirectional=True,
        change=lambda tensor: torch.full_like(tensor, value),
    )
    layers = problem.ours(), problem.stock(), problem.stock()
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if "weight_ih" in name:
                parameter.data = torch.arange(parameter.numel()).cos().view_as(parameter)
    with pyarch.backend(backend):
        mine = outcome(problem, layers[0])
    assert all(each.isfinite().all() for each in mine.values())
    wide = [each.double() for each in problem.arguments()]
    hold(mine, outcome(problem, layers[1]), outcome(problem, layers[2].double(), wide))


POISONED_STEP, POISONED_ROW = 2, 1


def poison(tensor):
    tensor[POISONED_STEP, POISONED_ROW] = float("nan")
    return tensor


@each_backend
@cases(
    *(
        problem
        for settings in (
            {},
            {"bidirectional": True, "layers": 2},
            {"batch": 17, "hidden": 33},
            {"dtype": torch.bfloat16, "bidirectional": True},
            {"dtype": torch.float16},
        )
        for problem in in_every_mode(**{"batch": 5, "change": poison, **settings})
    ),
    Problem("lstm", batch=5, change=poison, proj=3, bidirectional=True),
)
def test_recurrent_nan_stays_in_its_row(backend, problem):
    """Other rows are as without it, forward and backward; its row and dW have NaN wherever torch has it."""
    with pyarch.backend(backend):
        mine = outcome(problem, problem.ours())
    theirs, exact, _ = answers(problem)
    assert theirs["output"].isnan().any() and theirs["grad weight_hh_l0"].isnan().any()
    for name in mine:
        if name in OUTPUTS:
            assert torch.equal(mine[name].isnan(), theirs[name].isnan()), name
        assert mine[name].isnan()[theirs[name].isnan()].all(), name
    clean = [
        {name: others(each) for name, each in run.items() if "_l" not in name}
        for run in (mine, theirs, exact)
    ]
    assert not any(each.isnan().any() for each in clean[0].values())
    hold(*clean)


def rows(tensor):
    """The batch, dimension 1, first."""
    return tensor.movedim(1, 0)


def others(tensor):
    return torch.cat([rows(tensor)[:POISONED_ROW], rows(tensor)[POISONED_ROW + 1 :]])


@each_backend
@cases(
    *(
        Problem(mode, steps=4096, batch=2, inputs=3, hidden=8, dtype=dtype)
        for mode in MODES
        for dtype in (torch.float32, torch.bfloat16)
    )
)
def test_recurrent_drift_over_many_steps(backend, problem):
    prove(problem, backend)


@each_backend
@each_mode
def test_recurrent_backward_is_bitwise_repeatable(backend, mode):
    problem = Problem(mode, steps=20, batch=9, hidden=37, bidirectional=True)
    with pyarch.backend(backend):
        first, second = (outcome(problem, problem.ours()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

"""Recurrent layers on PackedSequence: every sequence as if it were alone, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import pyarch
from tests.conv_cases import expanded, misaligned, sliced
from tests.recurrent_models import (
    MODES,
    OUTPUTS,
    Problem,
    batch_major,
    cases,
    each_backend,
    each_dtype,
    each_mode,
    features_first,
    hold,
    outcome,
    prove,
)

OPERATOR = "recurrent"

LENGTHS = {
    "all 1": (1, 1, 1, 1),
    "equal": (6, 6, 6),
    "sorted": (9, 7, 7, 4, 1),
    "unsorted": (4, 9, 1, 7, 7),
    "rising": (1, 2, 3, 4, 5, 6, 7, 8, 9),
    "one sequence": (5,),
    "one long": (1, 30, 1),
    "many": tuple(1 + (7 * row) % 19 for row in range(33)),
    "long tail": (200, 150, 90, 40, 20, 10, 6, 5, 4, 3, 3, 2, 2, 2, 1, 1, 1, 1),
}


def packed(mode: str, lengths: tuple[int, ...], **settings) -> Problem:
    """A problem of sequences of these lengths, padded to the longest."""
    return Problem(mode, steps=max(lengths), batch=len(lengths), lengths=lengths, **settings)


def packed_in_every_mode(lengths=LENGTHS["unsorted"], **settings) -> list[Problem]:
    return [packed(mode, lengths, **settings) for mode in MODES]


# ------------------------------------------------------------------------------------ values


@each_backend
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both directions"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@each_mode
def test_recurrent_packed_lengths(backend, mode, lengths, bidirectional):
    prove(packed(mode, lengths, bidirectional=bidirectional), backend)


@each_backend
@each_dtype
@cases(*packed_in_every_mode(hidden=33, layers=2, bidirectional=True))
def test_recurrent_packed_dtypes(backend, problem, dtype):
    prove(replace(problem, dtype=dtype), backend)


@each_backend
@cases(
    *packed_in_every_mode(LENGTHS["sorted"], enforce_sorted=True, bidirectional=True),
    *packed_in_every_mode(batch_first=True, bidirectional=True),
    *packed_in_every_mode(state="none", layers=2),
    *packed_in_every_mode(state="expanded", bidirectional=True),
    *packed_in_every_mode(bias=False),
    *packed_in_every_mode(hidden=1, inputs=1, bidirectional=True, seed=1),
    *(
        packed("lstm", LENGTHS["unsorted"], proj=proj, bias=bias, bidirectional=both, layers=2)
        for proj in (1, 3)
        for bias in (True, False)
        for both in (True, False)
    ),
)
def test_recurrent_packed_flags(backend, problem):
    prove(problem, backend)


@each_backend
@cases(
    *packed_in_every_mode(reached=("h_n",), bidirectional=True),
    *packed_in_every_mode(reached=("output",), bidirectional=True),
    packed("lstm", LENGTHS["unsorted"], reached=("c_n",), bidirectional=True),
    *packed_in_every_mode(frozen=("input",)),
    *packed_in_every_mode(frozen=("weight", "bias")),
    *packed_in_every_mode(frozen=("h0", "c0", "bias_hh"), bidirectional=True),
    *(
        packed("gru", LENGTHS["unsorted"], grad_layout=layout, bidirectional=True)
        for layout in (sliced, misaligned, expanded, features_first)
    ),
    *(packed(mode, LENGTHS["unsorted"], layout=batch_major) for mode in ("lstm", "rnn_tanh")),
)
def test_recurrent_packed_gradients(backend, problem):
    prove(problem, backend)


@each_backend
@pytest.mark.parametrize("layout", [features_first, sliced, misaligned, expanded])
@cases(*packed_in_every_mode(bidirectional=True))
def test_recurrent_packed_data_of_any_layout(backend, problem, layout):
    """A PackedSequence whose data is no dense tensor."""
    sequence = pack_padded_sequence(problem.arguments()[0], problem.lengths, enforce_sorted=False)
    data = layout(sequence.data)
    cotangent = torch.randn(len(data), 2 * problem.hidden)
    runs = []
    for layer, leaf, engine in (
        (problem.ours(), data, backend),
        (problem.stock(), data.clone(), "auto"),
        (problem.stock().double(), data.double(), "auto"),
    ):
        leaf = leaf.detach().requires_grad_()
        with pyarch.backend(engine):
            output = layer(sequence._replace(data=leaf))[0].data
        (gradient,) = torch.autograd.grad(output, leaf, cotangent.to(output.dtype))
        runs.append({"output": output.detach(), "grad input": gradient})
    hold(*runs)


# ------------------------------------------------------------------------------------ each sequence alone


@each_backend
@cases(
    *packed_in_every_mode(bidirectional=True, layers=2),
    packed("lstm", LENGTHS["unsorted"], bidirectional=True, proj=3),
)
def test_recurrent_packed_sequences_are_as_if_alone(backend, problem):
    """Outputs and last states of each: the reverse direction begins at its own end, never in the padding."""
    layer, (input, *state) = problem.ours(), problem.arguments()
    with pyarch.backend(backend):
        together = problem.call(layer, [input, *state])
        sequence = pack_padded_sequence(input, problem.lengths, enforce_sorted=False)
        padded, _ = pad_packed_sequence(sequence._replace(data=together["output"]))
    stock = problem.stock()
    for row, length in enumerate(problem.lengths):
        one = [each[:, row : row + 1].contiguous() for each in state]
        hx = tuple(one) if problem.mode == "lstm" else one[0]
        output, last = stock(input[:length, row : row + 1], hx)
        torch.testing.assert_close(padded[:length, row], output[:, 0], rtol=1e-5, atol=1e-5)
        assert (padded[length:, row] == 0).all()
        for name, each in zip(OUTPUTS[1:], last if isinstance(last, tuple) else (last,), strict=False):
            torch.testing.assert_close(together[name][:, row], each[:, 0], rtol=1e-5, atol=1e-5)


@each_backend
@cases(*packed_in_every_mode(bidirectional=True, layers=2))
def test_recurrent_packed_padding_reaches_nothing(backend, problem):
    """NaN in the padding changes no result, and the padding's gradient is zero."""
    input, *state = problem.arguments()
    beyond = torch.arange(problem.steps)[:, None] >= torch.tensor(problem.lengths)
    spoiled = input.masked_fill(beyond[..., None], float("nan"))
    with pyarch.backend(backend):
        clean = outcome(problem, problem.ours(), [input, *state])
        mine = outcome(problem, problem.ours(), [spoiled, *state])
    assert all(torch.equal(mine[name], clean[name]) for name in clean)
    assert (mine["grad input"][beyond] == 0).all() and (mine["grad input"][~beyond] != 0).any()


@each_backend
@cases(*packed_in_every_mode(LENGTHS["equal"], bidirectional=True, layers=2, hidden=33))
def test_recurrent_packed_of_equal_lengths_is_the_padded_batch(backend, problem):
    with pyarch.backend(backend):
        as_packed = outcome(problem, problem.ours())
        padded = replace(problem, lengths=None)
        cotangents = {name: torch.randn(as_packed[name].shape) for name in OUTPUTS if name in as_packed}
        as_packed = outcome(problem, problem.ours(), cotangents=cotangents)
        cotangents["output"] = cotangents["output"].view(problem.steps, problem.batch, -1)
        as_padded = outcome(padded, padded.ours(), cotangents=cotangents)
    as_packed["output"] = as_packed["output"].view_as(as_padded["output"])
    for name in as_padded:
        torch.testing.assert_close(as_packed[name], as_padded[name], rtol=1e-4, atol=1e-5)


@each_backend
@each_mode
def test_recurrent_packed_nan_stays_in_its_sequence(backend, mode):
    problem = packed(mode, LENGTHS["unsorted"], bidirectional=True)
    input, *state = problem.arguments()
    poisoned = input.clone()
    poisoned[1, 3] = float("nan")
    runs = []
    with pyarch.backend(backend):
        for given in (poisoned, input):
            runs.append(outcome(problem, problem.ours(), [given, *state]))
    for name in ("h_n", "grad input", "grad h0"):
        bad, clean = (run[name].movedim(1, 0) for run in runs)
        assert bad[3].isnan().any() or (mode, name[:4]) == ("rnn_relu", "grad")
        rest = [row for row in range(problem.batch) if row != 3]
        torch.testing.assert_close(bad[rest], clean[rest], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------ the container


@each_backend
@each_mode
def test_recurrent_packed_output_is_packed_as_the_input(backend, mode):
    problem = packed(mode, LENGTHS["unsorted"], bidirectional=True)
    layer = problem.ours()
    sequences = [torch.randn(length, problem.inputs) for length in problem.lengths]
    given = pack_sequence(sequences, enforce_sorted=False)
    with pyarch.backend(backend):
        output, _ = layer(given)
    assert isinstance(output, PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(output, name) is getattr(given, name)
    assert output.data.shape == (len(given.data), 2 * problem.hidden)


@each_backend
@each_mode
def test_recurrent_packed_without_indices(backend, mode):
    """A PackedSequence of sequences that were sorted already has no permutation."""
    problem = Problem(mode, bidirectional=True)
    given = PackedSequence(torch.randn(6, problem.inputs), torch.tensor([3, 2, 1]))
    with pyarch.backend(backend):
        output, state = problem.ours()(given)
    expected, expected_state = problem.stock()(given)
    torch.testing.assert_close(output.data, expected.data, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-6)
    assert output.sorted_indices is None


@each_backend
@cases(*packed_in_every_mode(bidirectional=True))
def test_recurrent_packed_strides_are_torchs(backend, problem):
    with pyarch.backend(backend):
        mine = outcome(problem, problem.ours())
    theirs = outcome(problem, problem.stock())
    assert {name: each.stride() for name, each in mine.items()} == {
        name: each.stride() for name, each in theirs.items()
    }

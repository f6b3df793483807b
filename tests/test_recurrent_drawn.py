"""Recurrent layers of drawn shapes and flags, held to the tolerance rule.

A relu is drawn in float32 only: in 16 bits an activation may round to the other side of zero, which passes or
stops a whole gradient, so that only chosen numbers prove something.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conv_cases import expanded, misaligned, sliced
from tests.recurrent_models import (
    DTYPES,
    OUTPUTS,
    Problem,
    batch_major,
    contiguous,
    each_backend,
    each_mode,
    features_first,
    prove,
)

OPERATOR = "recurrent"
SIZES = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 48, 65]))
LAYOUTS = st.sampled_from([contiguous, batch_major, features_first, sliced, misaligned, expanded])
drawn = settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@st.composite
def problems(draw, mode: str) -> Problem:
    """Any layer: float32 twice as often as each other dtype, packed every third time."""
    lengths = None
    batch = draw(st.one_of(st.integers(1, 5), st.sampled_from([8, 9, 17])))
    steps = draw(st.integers(1, 12))
    if draw(st.integers(0, 2)) == 2:
        lengths = tuple(draw(st.lists(st.integers(1, 12), min_size=batch, max_size=batch)))
        steps = max(lengths)
    layers = draw(st.integers(1, 3))
    hidden = draw(SIZES)
    if layers > 1:
        # Lone units of a stack nearly cancel, and torch's error there is a sample of one.
        hidden = max(hidden, 4)
    reached = [name for name in OUTPUTS if name != "c_n" or mode == "lstm"]
    return Problem(
        mode,
        steps=steps,
        batch=batch,
        inputs=draw(SIZES),
        # A lone unit of a relu may be dead, and a dead layer proves nothing.
        hidden=max(hidden, 8) if mode == "rnn_relu" else hidden,
        proj=draw(st.integers(0, hidden - 1)) if mode == "lstm" else 0,
        layers=layers,
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, *DTYPES][: 1 if mode == "rnn_relu" else None])),
        state=draw(st.sampled_from(["given", "none", "expanded"])),
        lengths=lengths,
        layout=draw(LAYOUTS),
        grad_layout=draw(LAYOUTS),
        reached=tuple(draw(st.lists(st.sampled_from(reached), min_size=1, unique=True))),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def cells(draw, mode: str) -> Problem:
    return Problem(
        mode,
        cell=True,
        batch=draw(st.one_of(st.none(), st.integers(1, 33))),
        inputs=draw(SIZES),
        hidden=draw(SIZES) + (8 if mode == "rnn_relu" else 0),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES[: 1 if mode == "rnn_relu" else None])),
        state=draw(st.sampled_from(["given", "none"])),
        seed=draw(st.integers(0, 2**16)),
    )


@each_backend
@each_mode
@drawn
@given(data=st.data())
def test_recurrent_drawn_layers(backend, mode, data):
    prove(data.draw(problems(mode)), backend, drawn=True)


@each_backend
@each_mode
@drawn
@given(data=st.data())
def test_recurrent_drawn_cells(backend, mode, data):
    prove(data.draw(cells(mode)), backend, drawn=True)

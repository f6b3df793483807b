"""Recurrent calls measured to be slower on our CPU kernels: `auto` leaves them to torch, by name they run."""

from __future__ import annotations

import pytest
import torch

import pyarch
from pyarch import dispatch
from pyarch.ops.recurrent import FORWARD, RecurrentCall
from pyarch.ops.recurrent_measured import EMERALD_RAPIDS, ZEN_5, forward_concessions

OPERATOR = "recurrent"


def call(mode: str = "lstm", steps: int = 128, batch: int = 16, hidden: int = 256, **others) -> RecurrentCall:
    described = RecurrentCall(
        device="cpu",
        architecture="avx512",
        dtype=torch.float32,
        mode=mode,
        steps=steps,
        batch=batch,
        rows=steps * batch,
        input_size=hidden,
        hidden_size=hidden,
        proj_size=0,
        directions=1,
        bias=True,
        packed=False,
        save=False,
    )
    return described._replace(**others)


def cell(mode: str, batch: int, hidden: int, **others) -> RecurrentCall:
    return call(mode, 1, batch, hidden, cell=True, **others)


@pytest.mark.parametrize(
    ("described", "conceded"),
    [
        (call(), True),
        (call(save=True), False),
        (call(packed=True), False),
        (call(proj_size=64), False),
        (call(steps=31), False),
        (call(batch=15), False),
        (call(hidden=127), False),
        (call("gru"), False),
        (cell("lstm", 1, 128), True),
        (cell("rnn_relu", 1, 512, save=True), True),
        (cell("gru", 1, 512), False),
        (cell("gru", 1, 64, dtype=torch.bfloat16), False),
        (cell("rnn_tanh", 1, 64, dtype=torch.bfloat16), True),
        (cell("lstm", 16, 512, dtype=torch.bfloat16), True),
        (cell("lstm", 16, 512), False),
        (call("lstm", 1, 1, 128), False),
    ],
)
def test_recurrent_concedes_where_torch_was_measured_faster(described, conceded):
    reasons = list(forward_concessions(described))
    assert len(reasons) == conceded
    assert all("of torch" in reason and "see benchmarks/results" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("described", "conceded"),
    [
        (call(), False),
        (call(dtype=torch.bfloat16), False),
        (call(dtype=torch.bfloat16, save=True), False),
        (call("gru", batch=32, dtype=torch.bfloat16), False),
        (call(batch=64, hidden=512), True),
        (call(batch=64, hidden=512, save=True), True),
        (call("rnn_relu", 1, 1, 64), True),
        (call("rnn_relu", 2, 1, 64), False),
        (call("gru", 1, 16, 64), True),
        (call("gru", 1, 16, 64, save=True), False),
        (cell("gru", 64, 512), True),
        (cell("gru", 1, 64, dtype=torch.bfloat16), False),
        (cell("lstm", 16, 128, dtype=torch.bfloat16), True),
    ],
)
def test_recurrent_concedes_more_to_torch_with_amx(described, conceded):
    assert len(list(forward_concessions(described._replace(architecture="amx")))) == conceded


@pytest.mark.parametrize("regions", [ZEN_5, EMERALD_RAPIDS])
def test_recurrent_concedes_nothing_on_a_gpu(regions):
    assert not list(forward_concessions(call(device="cuda")))
    assert len(regions) == len(set(regions))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_recurrent_cell_left_to_torch(backend):
    refusals = next(each for each in FORWARD.backends if each.name == "cpu").refusals
    reasons = list(refusals(cell("lstm", 2, 8)))
    if reasons:
        pytest.skip(reasons[0])
    layer = pyarch.nn.LSTMCell(8, 8)
    used = []
    with (
        pyarch.backend(backend),
        dispatch.recording(lambda op, _, chosen: used.append((op.name, chosen.name))),
    ):
        sum(layer(torch.randn(2, 8))).sum().backward()
    ours = [("recurrent_forward", "cpu"), ("recurrent_backward", "cpu")]
    assert used == ([("recurrent_forward", "torch")] if backend == "auto" else ours)

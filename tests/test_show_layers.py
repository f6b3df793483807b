"""Each layer by itself: its times, what it computes and moves, and the ceilings that it is held against."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import pyarch
from pyarch import ceilings, layer_work, timing
from pyarch.layer_work import flop_of, work_of
from pyarch.verify_report import Ceilings, Timing, Work
from tests.swap_cases import depthwise, image, net

OPERATOR = "verify"
CPU = torch.device("cpu")
# The name pyarch.verify is the function.
VERIFY = sys.modules["pyarch.verify"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Timing and ceilings that take no time."""
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(layer_work, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "PRODUCT_SIZES", {"cpu": (64,)})


# -------------------------------------------------------------------------------- arithmetic


B, T, INPUTS, H, P = 3, 11, 5, 7, 4
GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}


def recurrent_flop(gates: int, inputs: int, state: int) -> int:
    """One layer in one direction: every gate reads the input and the state, each token."""
    return 2 * B * T * gates * H * (inputs + state)


def attention_flop(batch: int, tokens: int, width: int) -> int:
    """Four projections, scores, and the weighted sum of the values."""
    return 2 * batch * tokens * 4 * width * width + 2 * 2 * batch * tokens * tokens * width


@pytest.mark.parametrize("kind", GATES)
def test_flop_of_recurrent_layers(kind):
    x = torch.randn(T, B, INPUTS)
    assert flop_of(kind(INPUTS, H), ((x,), {})) == recurrent_flop(GATES[kind], INPUTS, H)
    both_ways = kind(INPUTS, H, 2, bidirectional=True)
    wanted = 2 * (recurrent_flop(GATES[kind], INPUTS, H) + recurrent_flop(GATES[kind], 2 * H, H))
    assert flop_of(both_ways, ((x,), {})) == wanted


def test_flop_of_a_projected_and_a_packed_lstm():
    projected = nn.LSTM(INPUTS, H, proj_size=P)
    assert (
        flop_of(projected, ((torch.randn(T, B, INPUTS),), {}))
        == recurrent_flop(4, INPUTS, P) + 2 * B * T * H * P
    )
    packed = pack_sequence([torch.randn(2, INPUTS), torch.randn(6, INPUTS)], enforce_sorted=False)
    assert flop_of(nn.LSTM(INPUTS, H), ((packed,), {})) == 2 * 8 * 4 * H * (INPUTS + H)


def test_flop_of_convolutions():
    x = torch.randn(2, 8, 10, 9)
    assert flop_of(depthwise(8), ((x,), {})) == 2 * (2 * 8 * 8 * 7) * 9
    assert flop_of(nn.Conv2d(8, 6, 3, padding=1), ((x,), {})) == 2 * (2 * 6 * 10 * 9) * (8 * 9)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_flop_of_attention(training):
    x = torch.randn(2, 10, 16)
    layer = nn.MultiheadAttention(16, 4, batch_first=True).train(training)
    alone = attention_flop(2, 10, 16)
    assert flop_of(layer, ((x, x, x), {"need_weights": False})) == alone
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).train(training)
    padding = torch.arange(10) > torch.tensor([[9], [6]])
    wanted = alone + 2 * (2 * 2 * 10 * 16 * 32)
    assert flop_of(block, ((x,), {"src_key_padding_mask": padding})) == wanted


def test_flop_of_a_swapped_layer_is_that_of_torchs_own():
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 10, 16)
    model = nn.Sequential(layer)
    pyarch.swap(model, rules={"0": pyarch.Config(window=(2, 2))})
    assert flop_of(layer, ((x, x, x), {})) == attention_flop(2, 10, 16), "the window is left aside"
    assert type(model[0]) is pyarch.nn.MultiheadAttention


def test_flop_is_unknown_where_the_layer_reads_its_data():
    class Reads(nn.Module):
        def forward(self, x):
            return x[: int(x.abs().sum())] @ x.T

    assert flop_of(Reads(), ((torch.ones(3, 3),), {})) is None


def test_flop_is_unknown_where_an_operator_is_closed_to_the_counter():
    library = torch.library.Library("show_layers", "DEF")
    library.define("fused(Tensor x) -> Tensor")
    library.impl("fused", lambda x: x @ x, "CompositeExplicitAutograd")

    class Fused(nn.Module):
        def forward(self, x):
            return torch.ops.show_layers.fused(x) @ x

    assert flop_of(Fused(), ((torch.ones(3, 3),), {})) is None


# -------------------------------------------------------------------------------- bytes and times


def test_work_counts_every_byte_once():
    layer = depthwise(bias=True)
    work = work_of(layer, layer, ((image(),), {}), backward=False)
    assert work.bytes == 4 * (2 * 4 * 9 * 9 + 4 * 9 + 4 + 2 * 4 * 7 * 7)
    assert work.inputs == "2x4x9x9 float32" and set(work.timing) == {"forward"}
    attention, x = nn.MultiheadAttention(16, 4, batch_first=True).to(torch.bfloat16), torch.randn(2, 10, 16)
    x = x.to(torch.bfloat16)
    mask = torch.zeros(10, 10, dtype=torch.bool)
    work = work_of(attention, attention, ((x, x, x), {"attn_mask": mask, "need_weights": False}), False)
    parameters = 4 * 16 * 16 + 4 * 16
    assert work.bytes == 2 * (x.numel() + parameters + x.numel()) + 100, "x is query, key and value at once"
    assert work.inputs == "2x10x16 bfloat16, 10x10 bool"


def test_work_of_a_packed_sequence_counts_its_data():
    packed = pack_sequence([torch.randn(6, INPUTS), torch.randn(2, INPUTS)])
    layer = nn.GRU(INPUTS, H)
    work = work_of(layer, layer, ((packed,), {}), backward=True)
    parameters = 3 * H * (INPUTS + H + 2)
    assert (
        work.bytes == 4 * (8 * INPUTS + parameters + 8 * H + 2 * H) and work.inputs == f"8x{INPUTS} float32"
    )


def test_work_derives_rates():
    work = Work("", 6_000_000, 2_000_000, {"forward": Timing(2e-3, 1e-3)})
    assert work.intensity == 3.0 and work.rate(work.timing["forward"].swapped) == pytest.approx(6.0)
    unknown = Work("", None, 10, {})
    assert unknown.intensity is None and unknown.rate(1.0) is None


def test_verify_times_every_layer_that_was_called():
    class Bypassed(nn.Module):
        def __init__(self):
            super().__init__()
            self.run, self.idle = depthwise(), depthwise()

        def forward(self, x):
            return self.run(x)

    with pyarch.backend("reference"):
        report = pyarch.verify(Bypassed(), image(), timing=False, layer_times=True)
    run, idle = report.layers
    assert (run.name, idle.name, idle.work) == ("run", "idle", None)
    assert set(run.work.timing) == {"forward", "step"}
    assert all(each.stock > 0 and each.swapped > 0 for each in run.work.timing.values())
    assert run.work.flop == 2 * (2 * 4 * 7 * 7) * 9
    assert report.ceilings.copy_gb_per_s > 0 and report.ceilings.dtype == "float32"
    assert report.as_dict()["layers"][0]["work"]["timing"]["step"].keys() == {"stock", "swapped"}


def test_verify_times_no_layer_unless_asked(monkeypatch):
    monkeypatch.setattr(VERIFY, "work_of", None)
    monkeypatch.setattr(VERIFY, "measured_ceilings", None)
    report = pyarch.verify(net(), image(), timing=False)
    assert [layer.work for layer in report.layers] == [None, None] and report.ceilings is None


def test_a_step_of_a_layer_gives_the_gradients_that_the_model_asked_for(monkeypatch):
    """The gradient of its input where the model needs it, none of ids and masks that need none."""
    given = []
    monkeypatch.setattr(VERIFY, "work_of", lambda layer, stock, arguments, _: given.append(arguments))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.MultiheadAttention(8, 2, batch_first=True)
            self.register_buffer("mask", torch.zeros(5, 5))

        def forward(self, x):
            return self.first(x, x, x, attn_mask=self.mask, need_weights=False)[0]

    pyarch.verify(Model(), torch.randn(2, 5, 8), timing=False, layer_times=True)
    (((query, key, value), named),) = given
    assert query.requires_grad and query is key is value and query.is_leaf
    assert not named["attn_mask"].requires_grad


@pytest.mark.parametrize("backward", [True, False], ids=["with gradients", "without"])
def test_verify_leaves_gradients_and_values_of_timed_inputs(monkeypatch, backward):
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.0)

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = depthwise()

        def forward(self, x, scale):
            return self.layer(x * scale.clamp_(max=2.0))

    x, scale = image().requires_grad_(), torch.tensor([3.0])
    pyarch.verify(Writes(), (x, scale), backward=backward)
    assert x.grad is None and scale.item() == 3.0


def test_rounds_go_on_until_the_budget_is_spent(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 2)
    ran: list[str] = []

    def rounds(budget: float) -> int:
        ran.clear()
        timed = timing.in_turns(lambda: ran.append("stock"), lambda: ran.append("ours"), budget)
        assert timed == Timing(1.0, 1.0) and ran.count("stock") == ran.count("ours")
        return ran.count("ours") - 1

    # Each reading of this clock takes a second: four a round, and one more for each look at the deadline.
    assert rounds(0.0) == 2
    assert rounds(30.0) == 7
    assert rounds(1e6) == timing.MOST_ROUNDS


# -------------------------------------------------------------------------------- ceilings


def test_ceilings_are_measured_once_a_dtype():
    ceilings.measured_ceilings.cache_clear()
    first = ceilings.measured_ceilings(CPU, torch.float32)
    assert first is ceilings.measured_ceilings(CPU, torch.float32)
    assert ceilings.measured_ceilings(CPU, torch.bfloat16).dtype == "bfloat16"
    assert first.copy_gb_per_s > 0 and first.matmul_gflop_per_s > 0
    ceilings.measured_ceilings.cache_clear()


def test_the_roof_bends_at_its_ridge():
    roof = Ceilings(10.0, 200.0, "float32")
    assert roof.ridge == 20.0
    assert [roof.at(place) for place in (5.0, 20.0, 80.0)] == [50.0, 200.0, 200.0]

"""The architectures that are compared: equal results, generation, counts, reach, growth, memory, failures."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pyarch import timing
from pyarch.comparison import measure
from pyarch.comparison.architectures import (
    CausalAttention,
    CausalConvolution,
    Recurrent,
    architectures,
    swapped,
)
from pyarch.comparison.generation import AttentionState, state_for
from pyarch.comparison.growth import exponent, shown
from pyarch.comparison.measure import Trial
from pyarch.comparison.question import Question
from pyarch.comparison.reach import Reach, log_spaced, reach_of, textbook
from pyarch.nn.drop_in import DropIn
from pyarch.peak_memory import peak_bytes
from tests.compare import check

OPERATOR = "comparison"
CPU = torch.device("cpu")
SMALL = Question(lengths=(5, 21), batch=2, width=16, heads=(1, 4, 8), window=6, kernel=5, budget=0.0)
ALL = {each.name: each for each in architectures(SMALL)}
SWAPPED = [name for name in ALL if name != "full conv"]
CAUSAL = [name for name, each in ALL.items() if each.is_causal]


def built(name: str, question: Question = SMALL) -> nn.Module:
    torch.manual_seed(0)
    return next(each for each in architectures(question) if each.name == name).build()


def results(module: nn.Module, x: torch.Tensor, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and all gradients, by name."""
    x = x.clone().requires_grad_()
    output = module(x)
    output.backward(cotangent)
    gradients = {name: each.grad for name, each in module.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **gradients}


# -------------------------------------------------------------------------------- both sides


def test_comparison_has_the_architectures_asked_for():
    assert list(ALL) == [
        "vanilla RNN",
        "GRU",
        "LSTM",
        "BiLSTM",
        "attention (1 head)",
        "attention (4 heads)",
        "attention (8 heads)",
        "windowed attention (4 heads)",
        "depthwise conv",
        "separable conv",
        "full conv",
    ]
    assert [name for name, each in ALL.items() if not each.is_causal] == ["BiLSTM"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", SMALL.lengths)
@pytest.mark.parametrize("name", SWAPPED)
def test_comparison_both_sides_compute_the_same(name, length, dtype):
    stock = built(name).to(dtype)
    ours, exact = swapped(stock), deepcopy(stock).double()
    assert any(isinstance(each, DropIn) for each in ours.modules())
    x = torch.randn(SMALL.batch, length, SMALL.width).to(dtype)
    cotangent = torch.randn_like(x)
    got, torchs = results(ours, x, cotangent), results(stock, x, cotangent)
    reference = results(exact, x.double(), cotangent.double())
    largest = max(each.abs().max().item() for key, each in reference.items() if key != "output")
    assert largest > 0
    for key, each in reference.items():
        check(f"{name} {key}", got[key], torchs[key], each, 0.0 if key == "output" else largest)


def test_comparison_has_nothing_to_swap_in_a_full_convolution():
    assert swapped(built("full conv")) is None


@pytest.mark.parametrize("name", CAUSAL)
def test_comparison_causal_outputs_know_nothing_of_later_tokens(name):
    module = built(name)
    x = torch.randn(1, 12, SMALL.width)
    other = torch.cat([x[:, :7], torch.randn(1, 5, SMALL.width)], 1)
    torch.testing.assert_close(module(x)[:, :7], module(other)[:, :7])
    assert not torch.allclose(module(x)[:, 7:], module(other)[:, 7:])


def test_comparison_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="width 16 is no multiple of 3 heads"):
        CausalAttention(16, 3)
    with pytest.raises(ValueError, match="width 15 cannot be shared by 2 directions"):
        Recurrent(nn.LSTM, 15, directions=2)


# -------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("first", [0, 4, 9])
@pytest.mark.parametrize(
    "name, side",
    [(name, side) for name in CAUSAL for side in ("stock", "pyarch") if side == "stock" or name in SWAPPED],
)
def test_comparison_generates_what_the_whole_sequence_gives(name, side, first):
    """Token by token, after the first ones were read at once."""
    stock, length = built(name), 15
    module = stock if side == "stock" else swapped(stock)
    x = torch.randn(SMALL.batch, length, SMALL.width)
    state = state_for(module, length)
    with torch.no_grad():
        if first:
            state.read(x[:, :first])
        tokens = [state.step(x[:, place : place + 1]) for place in range(first, length)]
        whole, reference = stock(x), deepcopy(stock).double()(x.double())
    check(name, torch.cat(tokens, 1), whole[:, first:], reference[:, first:])


def test_comparison_a_window_keeps_no_more_keys_than_it_shows():
    state = state_for(swapped(built("windowed attention (4 heads)")), 1000)
    assert isinstance(state, AttentionState) and state.places == SMALL.window + 1
    with torch.no_grad():
        state.read(torch.randn(2, 30, SMALL.width))
    assert [tuple(each.shape) for each in state.tensors] == [(2, 4, 7, 4)] * 2


# -------------------------------------------------------------------------------- counted


def parameters(name: str, question: Question = SMALL) -> int:
    return sum(each.numel() for each in built(name, question).parameters())


def test_comparison_gru_has_three_quarters_of_an_lstm():
    assert 4 * parameters("GRU") == 3 * parameters("LSTM") == 12 * parameters("vanilla RNN")


def test_comparison_heads_cost_no_parameters():
    assert parameters("attention (1 head)") == parameters("attention (8 heads)")


def test_comparison_separable_convolutions_are_small():
    width, kernel = SMALL.width, SMALL.kernel
    assert parameters("full conv") == width * width * kernel + width
    assert parameters("separable conv") == width * kernel + width + width * width + width
    assert built("separable conv").flop(21) * 3 < built("full conv").flop(21)


def counted_by_torch(module: nn.Module, length: int) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        module(torch.randn(1, length, SMALL.width))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["full conv", "separable conv", "depthwise conv"])
def test_comparison_flop_of_convolutions_is_what_torch_counts(name):
    assert built(name).flop(21) == counted_by_torch(built(name), 21)


@pytest.mark.parametrize("name", ["vanilla RNN", "GRU", "LSTM", "BiLSTM"])
def test_comparison_flop_of_recurrent_layers_are_two_a_weight_and_token(name):
    weights = sum(each.numel() for each in built(name).parameters() if each.dim() == 2)
    assert built(name).flop(21) == 2 * 21 * weights


@pytest.mark.parametrize("before", [None, 0, 6, 20, 50])
def test_comparison_pairs_of_attention_are_those_the_mask_shows(before):
    module = CausalAttention(SMALL.width, 4, before)
    module(torch.randn(1, 21, SMALL.width))
    assert module.pairs(21) == (module.mask == 0).sum().item()
    # In plain products attention computes all pairs, and torch counts them.
    with sdpa_kernel(SDPBackend.MATH):
        products = counted_by_torch(module, 21) - 4 * SMALL.width * 21 * 21
    assert module.flop(21) == products + 4 * SMALL.width * module.pairs(21)


# -------------------------------------------------------------------------------- reach


def measured_reach(name: str, length: int = 40, side: str = "stock") -> Reach:
    module = built(name) if side == "stock" else swapped(built(name))
    return reach_of(module, SMALL, length)


@pytest.mark.parametrize("side", ["stock", "pyarch"])
@pytest.mark.parametrize(
    "name, last",
    [
        ("windowed attention (4 heads)", SMALL.window),
        ("depthwise conv", SMALL.kernel - 1),
        ("separable conv", SMALL.kernel - 1),
    ],
)
def test_comparison_reach_ends_with_the_window_and_the_kernel(name, last, side):
    reach = measured_reach(name, side=side)
    assert reach.ends == last and not reach.is_whole
    assert all(norm > 0 for norm in reach.norms[: last + 1])
    assert not any(reach.norms[last + 1 :])


@pytest.mark.parametrize("side", ["stock", "pyarch"])
def test_comparison_attention_reaches_everything(side):
    reach = measured_reach("attention (4 heads)", side=side)
    assert reach.is_whole and reach.ends == reach.faded == 39


def test_comparison_a_vanilla_rnn_with_small_weights_forgets():
    reach = measured_reach("vanilla RNN")
    assert 0 < reach.half <= reach.faded < 20 and reach.ends == 39
    # Each step multiplies by little more than the spectral radius, here below 0.9.
    assert reach.shares[30] < 0.9**30


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_comparison_reach_of_a_linear_recurrence_is_the_textbooks(factor):
    """h[t] = x[t] + factor h[t - 1], whose gradient is factor^d."""

    def recurrence(x):
        h, outputs = torch.zeros_like(x[:, 0]), []
        for token in x.unbind(1):
            h = token + factor * h
            outputs.append(h)
        return torch.stack(outputs, 1)

    reach = reach_of(recurrence, SMALL, 101)
    assert reach.norms[100] / reach.norms[0] == pytest.approx(dict(textbook(factor))[100], rel=1e-4)
    assert {0.9: 2.7e-5, 1.1: 1.4e4}[factor] == pytest.approx(factor**100, rel=0.02)


def test_comparison_reach_in_numbers():
    reach = Reach((5.0, 2.0, 1.0, 0.5, 0.01))
    assert reach.shares == (2.5, 1.0, 0.5, 0.25, 0.005)
    assert (reach.half, reach.faded, reach.ends, reach.is_whole) == (2, 3, 4, False)
    assert reach.sampled() == [(1, 1.0), (2, 0.5), (3, 0.25), (4, 0.005)]
    nothing = Reach((1.0, 0.0, 0.0))
    assert (nothing.half, nothing.faded, nothing.ends) == (0, 0, 0)


def test_comparison_distances_are_spread_in_the_logarithm():
    spaced = log_spaced(2047)
    assert spaced[:3] == [1, 2, 3] and spaced[-1] == 2047 and len(spaced) <= 48
    assert log_spaced(1) == [1] and log_spaced(0) == []


# -------------------------------------------------------------------------------- growth


def test_comparison_growth_is_the_slope_of_logarithms():
    assert exponent((t, 3 * t**1.5) for t in (10, 100, 1000)) == pytest.approx(1.5)
    assert exponent([(10, 7.0), (100, 7.0)]) == pytest.approx(0)
    assert exponent([(10, 1.0), (10, 2.0)]) is None
    assert exponent([(10, 1.0), (20, None)]) is None
    assert [shown(each) for each in (1.94, -0.01, None)] == ["~T^1.9", "~T^0.0", "-"]


def memory_growth(module: nn.Module) -> float:
    lengths = (512, 1024, 2048)
    peaks = []
    for length in lengths:
        trial = Trial(deepcopy(module), torch.randn(1, length, 8).requires_grad_())
        peaks.append(peak_bytes(trial.step, CPU))
    return exponent(zip(lengths, peaks, strict=True))


@pytest.mark.unpoisoned
def test_comparison_memory_of_masks_and_weights_grows_with_the_square():
    class Weights(CausalAttention):
        """The attention of an architecture, whose weights are looked at."""

        def forward(self, x):
            return self.layer(x, x, x)[0]

    assert 1.8 < memory_growth(CausalAttention(8, 2, before=16)) < 2.1
    assert 1.8 < memory_growth(Weights(8, 2)) < 2.1


@pytest.mark.unpoisoned
@pytest.mark.parametrize("before", [16, None])
def test_comparison_memory_of_stated_patterns_grows_with_the_length(before):
    # Workspaces of the kernels do not grow at all.
    assert 0.3 < memory_growth(swapped(CausalAttention(8, 2, before))) < 1.1


@pytest.mark.unpoisoned
def test_comparison_peak_is_what_a_call_holds_at_a_time():
    def call():
        for _ in range(3):
            kept = torch.ones(1000)
            del kept
        both = torch.ones(500), torch.ones(700)
        del both

    assert peak_bytes(call, CPU) == pytest.approx(4 * 1200, abs=256)


# -------------------------------------------------------------------------------- what fails is a row


@pytest.fixture
def fast(monkeypatch):
    """Timing that takes no time."""
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)


def test_comparison_row_of_both_sides(fast):
    row = measure.measure(ALL["GRU"], SMALL, 21)
    assert row.length == 21
    for side in (row.stock, row.pyarch):
        assert not side.refused and min(side.forward, side.step, side.token) > 0
        assert side.memory > 2 * 21 * 16 * 4 and side.state == 2 * 16 * 4


def test_comparison_row_of_what_cannot_generate(fast):
    row = measure.measure(ALL["BiLSTM"], SMALL, 5)
    assert row.stock.token is row.stock.state is row.pyarch.token is None
    assert row.stock.step > 0 and row.pyarch.step > 0


def test_comparison_row_of_what_is_not_swapped(fast):
    row = measure.measure(ALL["full conv"], SMALL, 5)
    assert row.pyarch == measure.Side(refused="not swapped") and row.stock.step > 0


def test_comparison_row_of_what_cannot_be_built(fast):
    odd = replace(SMALL, width=15)
    (architecture,) = (each for each in architectures(odd) if each.name == "attention (4 heads)")
    row = measure.measure(architecture, odd, 5)
    assert row.stock.refused == row.pyarch.refused == "width 15 is no multiple of 4 heads"


def test_comparison_row_whose_mask_is_too_large(fast, monkeypatch):
    monkeypatch.setattr(measure, "LARGEST_MASK", 21 * 21 * 4 - 1)
    row = measure.measure(ALL["windowed attention (4 heads)"], SMALL, 21)
    assert row.stock.refused.startswith("skipped: its mask would take") and row.stock.step is None
    assert not row.pyarch.refused and row.pyarch.step > 0


@pytest.mark.parametrize("in_training", [True, False])
def test_comparison_row_of_a_side_that_fails(fast, in_training):
    class Failing(CausalConvolution):
        def forward(self, x):
            if torch.is_grad_enabled() == in_training and not isinstance(self.layer, DropIn):
                raise RuntimeError("no such sizes\nand more")
            return super().forward(x)

    failing = replace(ALL["depthwise conv"], build=partial(Failing, 16, 5, 16), is_causal=False)
    row = measure.measure(failing, SMALL, 5)
    assert row.stock.refused == "failed: no such sizes" and row.pyarch.step > 0


def test_comparison_turns_take_as_many_of_each():
    calls = []
    seconds = timing.rounds([lambda: calls.append("a"), lambda: calls.append("b")], 0.0)
    assert [len(each) for each in seconds] == [timing.FEWEST_ROUNDS] * 2
    assert calls.count("a") == calls.count("b") > timing.FEWEST_ROUNDS
    assert calls[:6] == ["a", "b", "b", "a", "a", "b"]
    assert timing.rounds([], 0.0) == []


def test_comparison_a_long_call_is_not_repeated():
    calls = []
    seconds = timing.rounds([lambda: calls.append("a"), lambda: calls.append("b")], 1.0, patience=-1.0)
    assert calls == ["a", "b"] and [len(each) for each in seconds] == [1, 1]


def test_comparison_keeps_the_spread_of_every_time(monkeypatch):
    """Eleven rounds of made-up times: the median, and the third and the ninth as 20 % and 80 %."""
    taken = [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.0, 1.0]
    monkeypatch.setattr(measure, "rounds", lambda calls, budget, patience: [taken, [2.0]])
    row = measure.measure(ALL["GRU"], SMALL, 5)
    assert (row.stock.forward, row.stock.step) == (0.5, 0.5)
    assert row.stock.spread["step"] == row.stock.interval("step") == pytest.approx((0.2, 0.8))
    tokens = measure.TOKENS_AT_A_TIME
    assert row.stock.token == pytest.approx(0.5 / tokens)
    assert row.stock.spread["token"] == pytest.approx((0.2 / tokens, 0.8 / tokens))
    assert row.pyarch.step == 2.0 and row.pyarch.spread == {}
    assert row.pyarch.interval("step") == pytest.approx((2.0 / 1.05, 2.0 * 1.05))
    assert row.pyarch.interval("memory") == (row.pyarch.memory, row.pyarch.memory)


def test_comparison_times_for_as_long_as_asked(monkeypatch):
    asked = []

    def rounds(calls, budget, patience):
        asked.append(budget)
        return [[1.0] for _ in calls]

    monkeypatch.setattr(measure, "rounds", rounds)
    measure.measure(ALL["BiLSTM"], replace(SMALL, budget=1.5), 5)
    assert asked == [1.5, 1.5]


def test_comparison_intervals_overlap_in_more_than_an_end():
    assert measure.overlap((1.0, 3.0), (2.0, 4.0)) and measure.overlap((2.0, 4.0), (1.0, 3.0))
    assert measure.overlap((1.0, 4.0), (2.0, 3.0)) and not measure.overlap((1.0, 2.0), (2.0, 3.0))
    assert not measure.overlap((2.0, 2.0), (2.0, 2.0)) and not measure.overlap((3.0, 4.0), (1.0, 2.0))

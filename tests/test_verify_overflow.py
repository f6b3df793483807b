"""verify where torch's own overflows, or is NaN where float64 is not: those places alone are left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import pyarch
from pyarch.passes import Results, compare_end_to_end, compare_layer
from pyarch.tolerance import error
from tests.swap_cases import image, net

OPERATOR = "verify"

NOT_FINITE = [math.inf, -math.inf, math.nan]


def ones(**changes) -> Results:
    """Outputs a and b and gradients w and v of ones, but for the first element of those named."""
    tensors = {name: torch.ones(4) for name in "abwv"}
    for name, value in changes.items():
        tensors[name][0] = value
    return Results({name: tensors[name] for name in "ab"}, {name: tensors[name] for name in "wv"})


def exact(results: Results) -> Results:
    doubled = [{name: each.double() for name, each in kind.items()} for kind in vars(results).values()]
    return Results(*doubled)


def failing(ours: Results, stocks: list[Results], reference: Results | None = None) -> set[str]:
    """What is beyond tolerance end to end; of one stock run, a layer by itself says the same."""

    def copied(results: Results) -> Results:
        return Results(*map(dict, vars(results).values()))

    reference = exact(ones()) if reference is None else reference
    found = compare_end_to_end(copied(ours), [copied(each) for each in stocks], copied(reference))
    names = {each.name for each in (*found.outputs, *found.gradients) if not each.kept}
    if len(stocks) == 1:
        outputs, gradients = compare_layer(copied(ours), copied(stocks[0]), copied(reference))
        assert {each.name for each in (*outputs, *gradients) if not each.kept} == names
    return names


def elsewhere(results: Results, name: str, value: float) -> Results:
    """The same results, with another value in the last element of one."""
    tensors = results.outputs if name in "ab" else results.gradients
    tensors[name][-1] = value
    return results


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("runs", ["one", "first", "jittered"])
def test_verify_overflow_of_torchs_own_excuses_its_place_alone(runs, value):
    broken = ones(a=value, w=value)
    stocks = {"one": [broken], "first": [broken, ones()], "jittered": [ones(), broken]}[runs]
    assert failing(ones(a=7, w=7), stocks) == set()
    assert failing(ones(a=value, w=math.nan), stocks) == set()
    for name in "abwv":
        for wrong in (7, *NOT_FINITE):
            assert failing(elsewhere(ones(), name, wrong), stocks) == {name}, (name, wrong)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_verify_overflow_of_float64_alone_excuses_its_place_alone(value):
    reference = exact(ones(a=value))
    assert failing(ones(a=7), [ones()], reference) == set()
    assert failing(ones(b=7), [ones()], reference) == {"b"}
    assert failing(elsewhere(ones(), "a", 7), [ones()], reference) == {"a"}


@pytest.mark.parametrize("value", NOT_FINITE)
def test_verify_overflow_of_ours_alone_fails(value):
    assert failing(ones(a=value, v=value), [ones(), ones()]) == {"a", "v"}


def test_verify_overflow_of_all_is_compared_with_its_sign():
    """Where torch's own and float64 give one infinity, or NaN, ours must too; of two signs it is left out."""
    assert failing(ones(a=math.inf), [ones(a=math.inf)], exact(ones(a=math.inf))) == set()
    for wrong in (-math.inf, math.nan, 7):
        assert failing(ones(a=wrong), [ones(a=math.inf)], exact(ones(a=math.inf))) == {"a"}
    assert failing(ones(a=math.inf), [ones(a=math.nan)], exact(ones(a=math.nan))) == {"a"}
    assert failing(ones(b=7), [ones(a=-math.inf)], exact(ones(a=math.inf))) == {"b"}


def test_verify_overflow_says_how_much_is_left_out():
    found = compare_end_to_end(ones(), [ones(a=math.inf), ones(b=math.nan)], exact(ones()))
    assert [each.left_out for each in found.outputs] == [0.25, 0.25]
    assert not any(each.is_hollow or each.nan for each in (*found.outputs, *found.gradients))
    assert all(math.isfinite(each.stock_error) and math.isfinite(each.allowed) for each in found.outputs)
    everything = Results({"a": torch.full((4,), math.inf)}, {})
    (hollow,) = compare_layer(everything, everything, Results({"a": torch.ones(4).double()}, {}))[0]
    assert hollow.is_hollow and hollow.left_out == 1


def test_verify_overflow_stock_of_another_shape_proves_nothing():
    wide, narrow = Results({"a": torch.ones(4)}, {}), Results({"a": torch.ones(3)}, {})
    reference = Results({"a": torch.ones(3).double()}, {})
    for ours in (wide, narrow):
        (comparison,) = compare_layer(ours, wide, reference)[0]
        assert not comparison.kept and comparison.ratio == math.inf


def test_verify_overflow_error_of_an_infinity_is_infinite():
    for value in NOT_FINITE:
        assert error(torch.tensor([1.0, value]), torch.ones(2)) == math.inf


class Overflowing(nn.Module):
    """A number that float32 cannot hold, beside a layer or alone."""

    def __init__(self, alone: bool):
        super().__init__()
        self.alone, self.layers = alone, net()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        large = torch.cat([x.new_full((1,), 1e30), x.new_ones(1)]) ** 2 * x.mean()
        return large[:1] if self.alone else (self.layers(x), large)


def test_verify_overflow_is_named_in_a_note():
    report = pyarch.verify(Overflowing(alone=False), image(), timing=False, backward=False).assert_ok()
    (note,) = [each for each in report.notes if each.startswith("not compared")]
    assert note == (
        "not compared: torch's own overflows there, or differs from float64 in being NaN, "
        "in output[1] (50% of it)"
    )


def test_verify_overflow_of_all_outputs_is_a_problem():
    report = pyarch.verify(Overflowing(alone=True), image(), timing=False, backward=False)
    assert any(
        each.startswith("not compared: ") and each.endswith("no output has a number left to compare")
        for each in report.problems
    )

"""The memory of a recurrent layer: its peak in training beside torch's, and what `recompute` saves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import pyarch
from tests.recurrent_models import MODES, Problem, answers, cases, each_backend, hold, in_every_mode, outcome

OPERATOR = "recurrent"
KIB = 1024


def peak(run) -> int:
    """The most bytes that torch's CPU allocator held at once for what was allocated during `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most > 0 and kept is not None, "the profiler saw no allocation"
    return most


def of_training(problem: Problem, layer: nn.Module) -> int:
    """Of forward and backward, first call included, with every result alive at the end."""
    arguments = problem.arguments()
    return peak(lambda: outcome(problem, layer, arguments))


def of_inference(problem: Problem, layer: nn.Module) -> int:
    arguments = list(problem.arguments())
    with torch.no_grad():
        return peak(lambda: problem.call(layer, arguments))


def swapped(problem: Problem, backend: str, recompute: bool) -> nn.Module:
    """Our layer by swap, with the switch."""
    layer = problem.stock()
    pyarch.swap(layer, rules={"*": pyarch.Config(backend=backend, recompute=recompute)})
    return layer


def test_recurrent_memory_is_measured():
    """The ruler: two megabytes alive at once, and a third after one of them went."""

    def run():
        first, second = torch.zeros(256, KIB), torch.zeros(256, KIB)
        del first
        return second, torch.zeros(256, KIB)

    assert 2 * KIB * KIB <= peak(run) < 2.1 * KIB * KIB


LENGTHS = tuple(range(8, 129, 8))


def sizes(steps: int) -> list[Problem]:
    """16 sequences of so many steps or, packed, of a sixteenth of it, two sixteenths and so on."""
    lengths = tuple(steps * length // 128 for length in reversed(LENGTHS))
    return [
        Problem(mode, steps=steps, batch=16, inputs=64, hidden=64, dtype=dtype, **settings)
        for dtype in (torch.float32, torch.bfloat16)
        for mode in MODES
        for settings in ({}, {"layers": 2, "bidirectional": True}, {"lengths": lengths})
    ] + [Problem("lstm", steps=steps, batch=16, inputs=64, hidden=64, proj=16)]


def keeps_a_copy(problem: Problem) -> bool:
    """Whether a copy of the output outweighs what our backward spares.

    torch lets an rnn's output be changed in place before the backward, so we keep one; a float32 layer has
    little else to spare.
    """
    return problem.mode.startswith("rnn") and problem.dtype == torch.float32 and not problem.lengths


@pytest.mark.unpoisoned
@pytest.mark.parametrize("backend", ["cpu"])
@cases(*sizes(128))
def test_recurrent_memory_of_training_is_at_most_torchs(backend, problem):
    with pyarch.backend(backend):
        mine = of_training(problem, problem.ours())
    theirs = of_training(problem, problem.stock())
    if keeps_a_copy(problem):
        mine -= problem.steps * problem.batch * problem.hidden * 4
    assert mine <= theirs, f"{mine / KIB:.0f} KiB, torch {theirs / KIB:.0f} KiB"


@pytest.mark.unpoisoned
@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize(("short", "long"), list(zip(sizes(128), sizes(256), strict=True)))
def test_recurrent_memory_of_inference_grows_at_most_as_torchs(backend, short, long):
    """With the steps: packed weights and blocks of them take some memory of their own, however few."""
    with pyarch.backend(backend):
        mine = of_inference(long, long.ours()) - of_inference(short, short.ours())
    theirs = of_inference(long, long.stock()) - of_inference(short, short.stock())
    assert mine <= theirs, f"{mine / KIB:.0f} KiB, torch {theirs / KIB:.0f} KiB"


GATED = [
    Problem(mode, steps=48, batch=8, inputs=32, hidden=64, **settings)
    for mode in ("lstm", "gru")
    for settings in ({}, {"layers": 2, "bidirectional": True}, {"lengths": (48, 30, 20, 9, 9, 5, 2, 1)})
]


def saved_bytes(problem: Problem, layer: nn.Module) -> int:
    """What autograd keeps between forward and backward besides arguments and parameters."""
    arguments = problem.arguments()
    own = {each.untyped_storage().data_ptr() for each in (*arguments, *layer.parameters())}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        outcome(problem, layer, arguments)
    return sum(kept.values())


@each_backend
@cases(*GATED)
def test_recurrent_recompute_keeps_only_the_states(backend, problem):
    """h (the output) and, for an LSTM, c in float32, and not the four blocks of gates."""
    plain, frugal = (
        saved_bytes(problem, swapped(problem, backend, recompute)) for recompute in (False, True)
    )
    rows = sum(problem.lengths) if problem.lengths else problem.steps * problem.batch
    blocks = rows * problem.hidden * 4 * (1 + problem.bidirectional) * problem.layers
    states = 2 if problem.mode == "lstm" else 1
    slack = 64 * KIB + (rows * problem.inputs * 4 if problem.lengths else 0)
    assert frugal <= states * blocks + slack
    assert plain >= (states + 4) * blocks
    assert plain - frugal >= 3.9 * blocks


@each_backend
@cases(
    *GATED,
    Problem("lstm", steps=20, proj=3, bidirectional=True),
    *in_every_mode(steps=20, dtype=torch.bfloat16),
    *in_every_mode(steps=1, frozen=("weight_hh", "bias")),
    *in_every_mode(state="none", bias=False),
)
def test_recurrent_recompute_gives_the_same_gradients(backend, problem):
    with pyarch.backend(backend):
        results = outcome(problem, swapped(problem, backend, recompute=True))
    hold(results, *answers(problem))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_recurrent_recompute_lowers_the_memory_between_the_passes(backend, mode):
    """Of a stack of layers, whose gates would all be alive when the backward begins."""
    problem = Problem(mode, steps=64, batch=8, inputs=64, hidden=64, layers=4)
    plain, frugal = (
        of_training(problem, swapped(problem, backend, recompute)) for recompute in (False, True)
    )
    assert frugal < 0.9 * plain, f"{frugal / KIB:.0f} KiB, without recompute {plain / KIB:.0f} KiB"

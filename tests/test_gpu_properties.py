"""What only a GPU has: streams, a second device, CUDA graphs, inductor's GPU code, repeats bit by bit.

Each body takes a device and is rehearsed on the CPU, where a stream is nothing and a graph is a plain call.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import pyarch
from tests.gpu_calls import BF16, CALLS, CAPTURED, FP32, REHEARSED, assert_same, full_precision, on_gpu

# About ten milliseconds of a GPU: a kernel on a wrong stream runs before its inputs are there.
SLEEP_CYCLES = 20_000_000
REPEATS = 20
each_rehearsed = pytest.mark.parametrize("name", REHEARSED)


# ------------------------------------------------------------------------------------ streams


def hold_second_stream(name: str, device: str) -> None:
    """The inputs come late, on a side stream: whoever launches elsewhere reads zeros."""
    call = CALLS[name]
    leaves = call.leaves(BF16, device)
    torch.manual_seed(3)
    expected = call.outcome(leaves)
    late = {key: torch.zeros_like(each) for key, each in leaves.items()}
    with side_stream(device):
        for key, each in late.items():
            each.copy_(leaves[key])
        torch.manual_seed(3)
        ours = call.outcome(late)
    assert_same(ours, expected)


@contextmanager
def side_stream(device: str):
    """A stream of its own that first sleeps; waits for it in the end."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        yield
    stream.synchronize()


@on_gpu
@pytest.mark.parametrize("name", CALLS)
def test_gpu_function_runs_on_the_current_stream(name):
    hold_second_stream(name, "cuda")


@each_rehearsed
def test_gpu_stream_rehearsed(name):
    hold_second_stream(name, "cpu")


# ------------------------------------------------------------------------------------ another device


def hold_other_device(name: str, device: str, first: str) -> None:
    """Tensors on one device while another is current: results on the former, equal to those of the latter."""
    call = CALLS[name]
    torch.manual_seed(3)
    expected = call.outcome(call.leaves(BF16, first))
    torch.manual_seed(3)
    ours = call.outcome(call.leaves(BF16, device))
    assert all(each.device == torch.device(device) for each in ours.values())
    assert_same(
        {key: each.cpu() for key, each in ours.items()}, {k: each.cpu() for k, each in expected.items()}
    )


@on_gpu
@pytest.mark.parametrize("name", CALLS)
def test_gpu_function_runs_on_a_device_that_is_not_current(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA GPU, needs two")
    with torch.cuda.device(0):
        hold_other_device(name, "cuda:1", "cuda:0")
        assert torch.cuda.current_device() == 0


@each_rehearsed
def test_gpu_other_device_rehearsed(name):
    hold_other_device(name, "cpu", "cpu")


# ------------------------------------------------------------------------------------ CUDA graphs


def hold_graph(name: str, device: str) -> None:
    """Forward and backward in one graph; replays follow what is written into the inputs."""
    call = CALLS[name]
    given = call.leaves(BF16, device)
    replay, captured = captured_outcome(call, given, device)
    for seed in (1, 2):
        other = call.leaves(BF16, device, seed)
        for key, each in given.items():
            each.copy_(other[key])
        replay()
        if not call.drawn:
            assert_same({key: each.clone() for key, each in captured().items()}, call.outcome(other))


def captured_outcome(call, given, device: str):
    """(replay, what gives its results); on a CPU a call in the graph's place."""
    made = {}
    if device == "cpu":
        return lambda: made.update(call.outcome(given)), lambda: made
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        call.outcome(given)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call.outcome(given)
    return graph.replay, lambda: made


@on_gpu
@pytest.mark.parametrize("name", CAPTURED)
def test_gpu_function_is_captured_in_a_cuda_graph(name):
    hold_graph(name, "cuda")


@each_rehearsed
def test_gpu_graph_rehearsed(name):
    hold_graph(name, "cpu")


def hold_dropout_of_replays(device: str) -> None:
    """Every replay draws anew, as every eager call does."""
    call = CALLS["attention dropout"]
    replay, captured = captured_outcome(call, call.leaves(BF16, device), device)
    outs = []
    for _ in range(2):
        replay()
        outs.append(captured()["result 0"].clone())
    assert not torch.equal(*outs)


@on_gpu
def test_gpu_dropout_differs_between_replays():
    hold_dropout_of_replays("cuda")


def test_gpu_dropout_of_replays_rehearsed():
    hold_dropout_of_replays("cpu")


# ------------------------------------------------------------------------------------ torch.compile


def hold_compiled(name: str, device: str, engine: str) -> None:
    """One graph, no break, dynamic shapes; what eager gives."""
    call = CALLS[name]
    torch._dynamo.reset()
    torch._dynamo.trace_rules.clear_lru_cache()
    leaves = call.leaves(FP32, device)
    fixed = call.fixed_on(torch.device(device))
    compiled = torch.compile(
        lambda given: call.made(given, fixed), fullgraph=True, dynamic=True, backend=engine
    )
    with full_precision():
        ours, expected = call.outcome(leaves, compiled), call.outcome(leaves)
    assert set(ours) == set(expected)
    for key, each in ours.items():
        if not call.drawn:
            torch.testing.assert_close(each, expected[key], rtol=1e-4, atol=1e-4)


# Through inductor one of each family; others as far as the graph that inductor would get.
INDUCTED = ["conv 3x3", "gru", "attention causal, grouped", "attention of sequences"]
TRACED = ["conv 7x7 nhwc", "lstm stack both ways", "lstm cell", "attention bias, softcap, sinks"]
TRACED += ["attention weights", "attention dropout", "attention on a cache"]


@on_gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, "inductor") for name in INDUCTED] + [(name, "aot_eager") for name in TRACED],
)
def test_gpu_function_compiles_whole(name, engine):
    hold_compiled(name, "cuda", engine)


@pytest.mark.slow
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["lstm cell", "attention of sequences"])
def test_gpu_compile_rehearsed(name):
    with pyarch.backend("reference"):
        hold_compiled(name, "cpu", "aot_eager")


# ------------------------------------------------------------------------------------ repeats


def hold_repeats(name: str, device: str, repeats: int) -> None:
    """In torch's deterministic mode, in memory that other numbers have been in."""
    call = CALLS[name]
    leaves = call.leaves(BF16, device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.manual_seed(3)
        first = call.outcome(leaves)
        for _ in range(repeats):
            torch.manual_seed(3)
            assert_same(call.outcome(leaves), first)
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpu
@pytest.mark.parametrize("name", CALLS)
def test_gpu_function_repeats_bit_by_bit(name):
    hold_repeats(name, "cuda", REPEATS)


@each_rehearsed
def test_gpu_repeats_rehearsed(name):
    hold_repeats(name, "cpu", 2)


# ------------------------------------------------------------------------------------ whole modules


def small_models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Models and the shape of their input."""
    return {
        "convnet": (
            nn.Sequential(
                nn.Conv2d(3, 24, 3, padding=1), nn.GELU(), nn.Conv2d(24, 24, 7, padding=3, groups=24),
                nn.Flatten(), nn.Linear(24 * 15 * 15, 5),
            ),
            (4, 3, 15, 15),
        ),
        "lstm": (nn.LSTM(19, 33, num_layers=2, bidirectional=True, batch_first=True), (4, 21, 19)),
        "gru": (nn.GRU(19, 40, batch_first=True), (4, 21, 19)),
        "encoder": (nn.TransformerEncoderLayer(48, 4, 96, 0.0, batch_first=True), (4, 21, 48)),
    }  # fmt: skip


def hold_model(name: str, device: str) -> None:
    """A swapped model trains one step as the stock one does, in float32."""
    stock, shape = small_models()[name]
    stock = stock.to(device)
    ours = copy.deepcopy(stock)
    pyarch.swap(ours)
    assert any(type(module).__module__.startswith("pyarch.") for module in ours.modules())
    x = torch.randn(shape).to(device)
    outcomes = []
    with full_precision():
        for model in (ours, stock):
            result = model(x)
            result = result[0] if isinstance(result, tuple) else result
            result.square().mean().backward()
            outcomes.append([result.detach(), *(each.grad for each in model.parameters())])
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@on_gpu
@pytest.mark.parametrize("name", small_models())
def test_gpu_swapped_model_trains_as_stock(name):
    hold_model(name, "cuda")


@pytest.mark.parametrize("name", small_models())
def test_gpu_model_rehearsed(name):
    hold_model(name, "cpu")

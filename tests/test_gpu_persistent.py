"""The persistent recurrent kernels on a GPU that they have to themselves: their programs wait for each other.

test_recurrent_persistent_triton.py runs the same kernels by interpreter and compiles those that run here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch  # noqa: E402

from pyarch.triton_kernels import recurrent_persistent as persistent  # noqa: E402
from tests.gpu_calls import BF16, FP16, on_gpu, precision  # noqa: E402
from tests.gpu_large import BEYOND, hold_layer, large  # noqa: E402
from tests.gpu_neighbour import hold_beside_a_neighbour  # noqa: E402
from tests.recurrent_persistent_cases import (  # noqa: E402
    LARGE_CASES,
    PRODUCTS,
    STRIDED,
    Problem,
    hold_strided,
    hold_to_reference,
    kernels,
    need_plans,
    planned,
)

OPERATOR = "recurrent"
# Seconds for one test, less than elsewhere: nothing runs beside it, and a barrier gives up after a few.
pytestmark = pytest.mark.timeout(40, method="thread")

# ------------------------------------------------------------------------------------ numbers


@on_gpu
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("name", LARGE_CASES)
@pytest.mark.parametrize("backend", ["triton"])
def test_recurrent_persistent_matches_float64_on_gpu(backend, name, product):
    dtype, tf32 = PRODUCTS[product]
    with precision(tf32):
        need_plans(Problem.drawn(LARGE_CASES[name], dtype, "cuda"))
        hold_to_reference(LARGE_CASES[name], dtype, "cuda")


# Of float32 only tf32 products have tiles on every GPU, and the CPU that answers has none.
@on_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", STRIDED)
def test_recurrent_persistent_takes_any_strides_on_gpu(name, dtype):
    hold_strided(replace(STRIDED[name], hidden=200), dtype, "cuda")


@large(50)
def test_recurrent_persistent_gates_of_more_than_2_31_elements():
    assert 32_800 * 16 * 4 * 1024 > BEYOND
    hold_layer("cuda", "lstm", 32_800, 16, 1024, 1, "persistent")


# ------------------------------------------------------------------------------------ many runs


@on_gpu
@pytest.mark.parametrize("name", ["lstm 512", "gru 200, both directions"])
def test_recurrent_persistent_beside_another_process_on_gpu(name):
    """A GPU goes from process to process as a whole, unless MPS shares it: no barrier expires meanwhile."""
    hold_beside_a_neighbour(name, "cuda", 3.0)


@on_gpu
@pytest.mark.parametrize("name", ["lstm 512", "gru 200, both directions", "rnn 768"])
def test_recurrent_persistent_repeats_bitwise_on_gpu(name):
    problem = Problem.drawn(LARGE_CASES[name], BF16, "cuda")
    incoming = problem.incoming()
    first = kernels(problem, incoming)
    for _ in range(200):
        again = kernels(problem, incoming)
        assert all(torch.equal(first[name], again[name]) for name in first)
    torch.cuda.synchronize()
    persistent.raise_alarm(problem.input.device)


@on_gpu
def test_recurrent_persistent_on_two_streams_at_once():
    names = ("lstm 512", "gru 193, one sequence")
    problems = [Problem.drawn(LARGE_CASES[name], BF16, "cuda") for name in names]
    incomings = [problem.incoming() for problem in problems]
    alone = [kernels(problem, incoming) for problem, incoming in zip(problems, incomings, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(50):
        together = []
        for stream, problem, incoming in zip(streams, problems, incomings, strict=True):
            with torch.cuda.stream(stream):
                together.append(kernels(problem, incoming))
        torch.cuda.synchronize()
        for expected, ours in zip(alone, together, strict=True):
            assert all(torch.equal(expected[name], ours[name]) for name in expected)
    persistent.raise_alarm(problems[0].input.device)


@on_gpu
def test_recurrent_persistent_refuses_more_programs_than_the_gpu_holds():
    problem = Problem.drawn(LARGE_CASES["lstm 512"], BF16, "cuda")
    device = problem.input.device
    loop = planned(problem, persistent.place_of(device))[0][0]
    limits = persistent.multiprocessor_of(device)
    each = persistent.programs_at_once(limits, persistent.footprint_of(loop, device))
    count = persistent.place_of(device).multiprocessors
    persistent.need_resident(replace(loop, grid=each * count), device)
    with pytest.raises(NotImplementedError, match="programs must run at once, this GPU holds"):
        persistent.need_resident(replace(loop, grid=each * count + 1), device)


@on_gpu
def test_recurrent_persistent_barrier_that_expires_on_gpu():
    problem = Problem.drawn(LARGE_CASES["lstm 512"], BF16, "cuda")
    device = problem.input.device
    (loop, expiry), results = planned(problem, persistent.place_of(device))
    replace(loop, grid=1, arguments=loop.arguments | {"spin_limit": 1000}).run(device)
    expiry.run(device)
    torch.cuda.synchronize()
    assert all(result.isnan().all() for result in results[:3])
    with pytest.raises(RuntimeError, match="gave up waiting for its own programs"):
        persistent.forward(*problem.forward_arguments())
    persistent.forward(*problem.forward_arguments())


@on_gpu
@pytest.mark.parametrize("name", ["lstm 512", "gru 200, both directions"])
def test_recurrent_persistent_in_a_cuda_graph(name):
    problem = Problem.drawn(LARGE_CASES[name], BF16, "cuda")
    incoming = problem.incoming()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernels(problem, incoming)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels(problem, incoming)
    problem.input.copy_(torch.randn_like(problem.input))
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    expected = kernels(problem, incoming)
    assert all(torch.equal(captured[name], expected[name]) for name in expected)

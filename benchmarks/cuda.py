"""Timing on a GPU: events around one call on cold caches, and the fastest of torch's own kernels as stock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from benchmarks.measure import Timer, quantile

FLUSH_BYTES = 256 << 20
STOCK_KERNELS = ("auto", "cudnn", "native")
TRIALS = 5
CAPTURE_WARM_UPS = 3
# Few enough that the queue of launches does not fill, which would let the GPU hold Python up.
ENQUEUED_CALLS = 5


class EventTimer:
    """Seconds per call between CUDA events, on a cold L2 cache: a 256 MiB buffer is written before each call.

    The write also keeps the GPU busy while the call is launched, so that launching is not part of its time.
    """

    def __init__(self) -> None:
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        spans = []
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.buffer.zero_()
            start.record()
            function()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / calls / 1e3


def fastest_stock(function: Callable[[], object], timer: EventTimer) -> tuple[Callable[[], object], str]:
    """`function` under the fastest setting of torch's choice of depthwise kernel, and that setting's name."""
    if not hasattr(torch.backends.cudnn, "depthwise_kernel"):
        return function, "auto"

    def under(kernel: str) -> Callable[[], object]:
        def call() -> object:
            allow_tf32 = torch.backends.cudnn.allow_tf32
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=allow_tf32, depthwise_kernel=kernel):
                return function()

        return call

    medians = trial_medians(under, STOCK_KERNELS, timer)
    if not medians:
        return function, "auto"
    best = min(medians, key=medians.__getitem__)
    return under(best), best


def trial_medians(
    under: Callable[[str], Callable[[], object]], kernels: Iterable[str], timer: Timer
) -> dict[str, float]:
    """Seconds of the call under each kernel by a few trials; kernels that torch refuses are left out."""
    medians = {}
    for name in kernels:
        try:
            call = under(name)
            timer(call, TRIALS)
            medians[name] = quantile([timer(call, 1) for _ in range(TRIALS)], 0.5)
        except RuntimeError as refusal:
            if isinstance(refusal, torch.cuda.OutOfMemoryError):
                raise
    return medians


def enqueue_seconds(call: Callable[[], object]) -> float:
    """Seconds that a call takes to hand its work to an idle GPU, not waiting for it; the median of TRIALS."""
    samples = []
    for _ in range(TRIALS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(ENQUEUED_CALLS):
            call()
        samples.append((time.perf_counter() - start) / ENQUEUED_CALLS)
    torch.cuda.synchronize()
    return quantile(samples, 0.5)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of `call` as a CUDA graph. Raises RuntimeError where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay

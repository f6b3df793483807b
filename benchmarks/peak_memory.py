"""The most memory that one call allocates at a time, beyond what was there before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.profiler import profile


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Bytes that torch's allocator of the device held at most for what was allocated during `call`."""
    return peak_on_gpu(call) if device == "cuda" else peak_on_cpu(call)


def peak_on_gpu(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(call: Callable[[], object]) -> int:
    with profile(profile_memory=True) as profiler:
        call()
    events = [each for each in profiler.kineto_results.events() if each.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most

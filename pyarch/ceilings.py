"""What a device can do at most, measured in the run that quotes it: the roof over the layers of a model.

Like `benchmarks.copy_speed` and `benchmarks.matmul_speed`, but for one second inside `pyarch.verify`: the
fastest of a few copies and products of two sizes stand for the device. A benchmark takes longer: it copies as
an operator runs, into memory that it allocates, and takes the median; its products go up to 2048. Its roof is
therefore the lower one in bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch

from pyarch.timing import finish
from pyarch.verify_report import Ceilings

# Bytes that a copy moves, read and written together: beyond the reach of any cache.
COPY_BYTES = 512 << 20
PRODUCT_SIZES = {"cpu": (512, 1024), "cuda": (4096, 8192)}
REPEATS = 9


@cache
def measured_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure a device, once a process for each dtype; takes about a second and 512 MiB."""
    source = torch.ones(COPY_BYTES // 8, device=device)
    target = torch.zeros_like(source)
    copy_seconds = _fastest(lambda: target.copy_(source))
    rates = []
    for size in PRODUCT_SIZES[device.type]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates.append(2 * size**3 / _fastest(lambda left=left, right=right: left @ right) / 1e9)
    return Ceilings(COPY_BYTES / copy_seconds / 1e9, max(rates), str(dtype).removeprefix("torch."))


def _fastest(function: Callable[[], object]) -> float:
    """The shortest of several runs in seconds: a ceiling is what nothing disturbed."""
    function()
    finish()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        finish()
        seconds.append(time.perf_counter() - start)
    return min(seconds)

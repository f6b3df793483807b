"""Copy bandwidth of this machine, measured in the run that quotes it: the ceiling of memory-bound work.

A copy here is `tensor.clone()`: like an operator it allocates its result, under the same allocator state.
"""

from __future__ import annotations

import time

import torch

from benchmarks.measure import Timer, quantile

LARGE_BYTES = 512 << 20
SMALLEST_BYTES = 64 << 10
SECONDS = 0.15


class CopySpeed:
    """Copy bandwidth in GB/s (bytes read plus bytes written, over the median time), measured once a size."""

    def __init__(self, device: str, timer: Timer, seconds: float = SECONDS) -> None:
        self.device = device
        self.timer = timer
        self.seconds = seconds
        self.measured: dict[int, float] = {}

    def beyond_cache(self) -> float:
        """GB/s of a copy that moves 512 MiB, beyond the reach of any cache."""
        return self.moving(LARGE_BYTES)

    def like(self, total_bytes: int) -> float:
        """GB/s of a copy that moves about `total_bytes` (the next power of two), in cache where it fits."""
        return self.moving(min(LARGE_BYTES, max(SMALLEST_BYTES, 1 << (total_bytes - 1).bit_length())))

    def moving(self, total_bytes: int) -> float:
        if total_bytes not in self.measured:
            source = torch.ones(total_bytes // 8, device=self.device)
            self.timer(source.clone, 3)
            times = [self.timer(source.clone, 1) for _ in range(5)]
            deadline = time.perf_counter() + self.seconds
            while time.perf_counter() < deadline:
                times.append(self.timer(source.clone, 1))
            self.measured[total_bytes] = total_bytes / quantile(times, 0.5) / 1e9
        return self.measured[total_bytes]

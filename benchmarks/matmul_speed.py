"""The highest rate that torch.mm reaches on this machine, measured in the run that quotes it.

It is the ceiling of work that consists of matrix products: a square product large enough to hide its edges,
of the best size for each dtype. fp32 products follow torch's switch for them: on a GPU they are not in tf32
by default, while recurrent layers are, whose share of this rate may then pass 100 %.
"""

from __future__ import annotations

import time

import torch

from benchmarks.measure import Timer

SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
WARM_UPS = 2
# Of each size: so many products, fewer where they take long.
REPEATS = 9
FEWEST_REPEATS = 3
SECONDS = 0.3


class MatmulSpeed:
    """GFLOP/s of torch.mm, two operations a multiplication with its addition, measured once a dtype."""

    def __init__(self, device: str, timer: Timer, sizes: tuple[int, ...] | None = None) -> None:
        self.device = device
        self.timer = timer
        self.sizes = sizes or SIZES[device]
        self.measured: dict[torch.dtype, float] = {}

    def of(self, dtype: torch.dtype) -> float:
        """The highest GFLOP/s over the sizes, each by its shortest time."""
        if dtype not in self.measured:
            self.measured[dtype] = max(self.at(size, dtype) for size in self.sizes)
        return self.measured[dtype]

    def at(self, size: int, dtype: torch.dtype) -> float:
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))

        def product() -> torch.Tensor:
            return torch.mm(left, right)

        self.timer(product, WARM_UPS)
        times: list[float] = []
        deadline = time.perf_counter() + SECONDS
        while len(times) < FEWEST_REPEATS or (len(times) < REPEATS and time.perf_counter() < deadline):
            times.append(self.timer(product, 1))
        return 2 * size**3 / min(times) / 1e9

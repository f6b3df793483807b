"""Depthwise convolution measured: how a case is built, and its bytes beside a copy's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.benchmark import DTYPES, Benchmark
from benchmarks.conv_cases import ConvCase
from benchmarks.copy_speed import CopySpeed
from benchmarks.cuda import fastest_stock
from benchmarks.twins import Twins, twin_modules

MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def build(case: ConvCase, device: str) -> Twins:
    """Modules, input and a dense cotangent in the output's own memory format, from a fixed seed."""
    torch.manual_seed(0)
    kind, dtype = MODULES[len(case.spatial)], DTYPES[case.dtype]

    def make() -> nn.Module:
        return kind(
            case.channels,
            case.channels,
            case.kernel,
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.channels,
            device=device,
            dtype=dtype,
        )

    stock, ours = twin_modules(make)
    source = torch.randn(case.batch, case.channels, *case.spatial, device=device, dtype=dtype)
    if case.channels_last:
        source = source.contiguous(memory_format=CHANNELS_LAST[source.dim()])
    source.requires_grad_()
    with torch.no_grad():
        cotangent = torch.randn_like(stock(source))
    return Twins(stock, ours, (source,), cotangent, ("output",), lambda module, inputs: (module(*inputs),))


class ConvBenchmark(Benchmark):
    """Rows with the bytes that must move, as a share of what a copy moves in the same time."""

    def __init__(self, device: str, budget_seconds: float, versus: str = "eager") -> None:
        super().__init__(device, budget_seconds, versus)
        self.copy_speed = CopySpeed(device, self.timer)

    def build(self, case: ConvCase) -> Twins:
        return build(case, self.device)

    def ceilings(self) -> dict:
        return {"copy_gb_per_s": self.copy_speed.beyond_cache()}

    def figures(self, case: ConvCase, pass_name: str, ours_ms: float) -> dict:
        moved = case.minimum_bytes(pass_name)
        gb_per_s = moved / (ours_ms * 1e-3) / 1e9
        return {
            "bytes": moved,
            "gb_per_s": gb_per_s,
            "copy_share": gb_per_s / self.copy_speed.beyond_cache(),
            "copy_share_like_size": gb_per_s / self.copy_speed.like(moved),
        }

    def stock_call(self, pass_name: str, twins: Twins) -> tuple[Callable[[], object], str]:
        call, kernel = super().stock_call(pass_name, twins)
        if self.device == "cuda" and self.versus == "eager":
            return fastest_stock(call, self.timer)
        return call, kernel

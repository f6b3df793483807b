"""Depthwise convolution measured: how a case is built, and its bytes beside a copy's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from benchmarks.benchmark import DTYPES, Benchmark, Call
from benchmarks.conv_cases import ConvCase
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


def one_point(case: ConvCase) -> ConvCase:
    """The same kind of convolution with two channels, of which it stays depthwise, and the smallest input."""
    least = max(1, case.dilation * (case.kernel - 1) + 1 - 2 * case.padding)
    return replace(case, batch=1, channels=2, spatial=(least,) * len(case.spatial), goals={})


class ConvBenchmark(Benchmark):
    """Rows with the bytes that must move, as a share of what a copy moves in the same time."""

    def build(self, case: ConvCase) -> Twins:
        return build(case, self.device)

    def tiny(self, case: ConvCase) -> ConvCase:
        return one_point(case)

    def figures(self, case: ConvCase, pass_name: str, ours_ms: float, attained: dict[str, float]) -> dict:
        return {
            "copy_share": attained["gb_per_s"] / self.copy_speed.beyond_cache(),
            "copy_share_like_size": attained["gb_per_s"] / self.copy_speed.like(attained["bytes"]),
        }

    def stock_call(self, pass_name: str, twins: Twins) -> tuple[Call, str]:
        call, kernel = super().stock_call(pass_name, twins)
        return fastest_stock(call, self.timer) if self.device == "cuda" else (call, kernel)

"""Why a backend of ours cannot run a call: what every operator's kernels need of device and dtype."""

from __future__ import annotations

from typing import Protocol

import torch

from pyarch import hardware, native
from pyarch.dispatch import Reasons

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class KernelCall(Protocol):
    device: str
    dtype: torch.dtype


def triton_refusals(call: KernelCall) -> Reasons:
    if hardware.triton_version() is None:
        yield "Triton not installed, needs triton >= 3.6"
    if call.device != "cuda" and not hardware.triton_interprets():
        yield f"device {call.device}, needs a GPU (or TRITON_INTERPRET=1)"
    yield from dtype_refusals(call)


def cuda_refusals(call: KernelCall) -> Reasons:
    yield "CUDA C++ kernels not written yet, triton serves GPUs"


def cpu_refusals(call: KernelCall) -> Reasons:
    if call.device != "cpu":
        yield f"device {call.device}, needs cpu"
    elif native.serving()[0] is None:
        yield native.serving()[1]
    yield from dtype_refusals(call)


def dtype_refusals(call: KernelCall) -> Reasons:
    if call.dtype not in KERNEL_DTYPES:
        yield f"dtype {call.dtype}, needs float32, bfloat16 or float16"

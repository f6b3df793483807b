"""Facts about this machine, each probed once: CPU instruction sets, GPUs, Triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from functools import cache
from pathlib import Path

import torch

# Fastest first. Each is built into its own library, pyarch/_cpu_<name>.so; flags as /proc/cpuinfo names them.
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c"}
CPU_INSTRUCTION_SETS = {
    "amx": _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512_bf16": _AVX512 | {"avx512_bf16"},
    "avx512": _AVX512,
    "avx2": {"avx2", "fma", "f16c"},
}
_CPUINFO = Path("/proc/cpuinfo")


@cache
def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags as the Linux kernel names them; empty where it does not tell."""
    if platform.machine() not in ("x86_64", "AMD64") or not _CPUINFO.exists():
        return frozenset()
    for line in _CPUINFO.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@cache
def cpu_model() -> str:
    """The CPU's name, for reports."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def supported_instruction_sets() -> tuple[str, ...]:
    """The names of CPU_INSTRUCTION_SETS that this CPU has, fastest first."""
    return tuple(name for name, needed in CPU_INSTRUCTION_SETS.items() if needed <= cpu_flags())


@cache
def triton_version() -> str | None:
    """The installed Triton's version without importing it, or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.metadata.version("triton")


def triton_interprets() -> bool:
    """Whether TRITON_INTERPRET makes Triton kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def gpu_architecture(index: int) -> str:
    """The architecture of GPU `index`: "sm_90", "gfx942", ..."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def cpu_architecture() -> str:
    """The CPU's best instruction set of ours, or its machine's name."""
    return next(iter(supported_instruction_sets()), platform.machine())


def architecture(device: torch.device) -> str:
    """The architecture that decides which kernels fit: a GPU's, or the CPU's best instruction set."""
    if device.type == "cpu":
        return cpu_architecture()
    if device.type == "cuda":
        return gpu_architecture(device.index if device.index is not None else torch.cuda.current_device())
    return device.type

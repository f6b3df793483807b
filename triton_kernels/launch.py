"""A kernel launch as a value: what the host would run, and what the compile audit compiles without a GPU."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Requirement:
    """What a kernel declares about its machine code: least shares of 128-bit accesses among its global
    loads and stores, whether it must use tensor cores, and by which opcode on a target that has several."""

    wide_loads: float = 0.0
    wide_stores: float = 0.0
    tensor_core: bool = False
    opcodes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid and arguments.

    Args:
        kernel: the ``triton.jit`` function.
        grid: number of programs; nothing is launched where it is 0.
        arguments: tensors (or None), and integers that may differ from call to call.
        constants: compile-time constants.
        options: num_warps, num_stages.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def run(self, device: torch.device) -> None:
        """Launch on the device's current stream."""
        if self.grid == 0:
            return
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[(self.grid,)](**self.arguments, **self.constants, **self.options)

"""Compile one launch for one target, as the runtime would, and read the machine code."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks.machine_code import amd_figures, nvidia_figures
from pyarch.triton_kernels.launch import Launch

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
# The runtime tells AMD's compiler which tensors are smaller than this, for its buffer instructions.
SMALL_TENSOR_BYTES = 2**31


def prepare_worker() -> None:
    """Give this process a Triton cache of its own, so that every figure comes from a fresh compilation."""
    folder = tempfile.mkdtemp(prefix="pyarch-audit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TRITON_CACHE_DIR"] = folder


def source_of(launch: Launch, amd: bool = False) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) as the runtime derives them from a call's arguments.

    Integers equal to 1 and absent tensors are constants; integers divisible by 16 and aligned pointers are
    marked so, unless the kernel's parameter is not to be specialized.
    """
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[name] = "constexpr", launch.constants[name]
            continue
        value = launch.arguments[name]
        marks = []
        special = not launch.kernel.params[position].do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and special):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            marks += [["tt.divisibility", 16]] if value % 16 == 0 and special else []
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = TYPES[value.dtype]
            marks += [["tt.divisibility", 16]] if value.data_ptr() % 16 == 0 else []
            bytes_spanned = value.untyped_storage().nbytes()
            marks += [["tt.pointer_range", 32]] if amd and bytes_spanned < SMALL_TENSOR_BYTES else []
        if marks:
            attributes[(position,)] = marks
    return signature, constants, attributes


def compile_figures(launch: Launch, backend: str, architecture: int | str, warp_size: int) -> dict:
    """Compile for GPUTarget(backend, architecture, warp_size) and return the machine code's figures."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = source_of(launch, amd=backend == "hip")
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget(backend, architecture, warp_size),
        options=dict(launch.options),
    )
    if backend == "hip":
        figures = amd_figures(compiled.asm["amdgcn"])
    else:
        figures = nvidia_figures(*(dump(compiled.asm["cubin"], option) for option in ("-res-usage", "-sass")))
    # The machine code does not show the shared memory that a launch adds, which is all that Triton uses.
    return figures | {"shared_bytes": compiled.metadata.shared}


def dump(cubin: bytes, option: str) -> str:
    """What the cuobjdump shipped with Triton prints about a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout

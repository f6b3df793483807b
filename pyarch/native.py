"""The C++ CPU kernels: which libraries were built, which serve this CPU, and how they are called.

Each instruction set has its own library, `pyarch/_cpu_<name>.so`, and its own operator namespace,
`torch.ops.pyarch_cpu_<name>`. They are loaded at the first use, never at import.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from pyarch import hardware

_FOLDER = Path(__file__).parent
_VARIABLE = "PYARCH_CPU_ISA"
# A library that holds only what its instruction set adds, and the one that serves the rest.
ADDS_TO = {"amx": "avx512_bf16"}
BUILD = "build it with: PYARCH_BUILD_EXT=1 pip install -e . --no-build-isolation"


def library_path(instruction_set: str) -> Path:
    """Where the library of an instruction set stands when it was built."""
    return _FOLDER / f"_cpu_{instruction_set}.so"


@cache
def load(instruction_set: str) -> str | None:
    """Load one library; return None when it serves, else what is wrong and how to mend it."""
    if instruction_set not in hardware.supported_instruction_sets():
        return f"instruction set {instruction_set}, this CPU lacks it"
    if instruction_set in ADDS_TO and (problem := load(ADDS_TO[instruction_set])) is not None:
        return problem
    path = library_path(instruction_set)
    if not path.exists():
        return f"C++ CPU extension for {instruction_set} not built, {BUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load under torch {torch.__version__}: {error}, {BUILD}"
    namespace = getattr(torch.ops, f"pyarch_cpu_{instruction_set}")
    if instruction_set == "amx" and not namespace.permit_tile_registers():
        return "instruction set amx, the operating system keeps its tile registers from this process"
    return None


@cache
def serving() -> tuple[str | None, str]:
    """The instruction set whose kernels serve, with an empty reason; or None and the reason."""
    asked = os.environ.get(_VARIABLE)
    if asked and asked not in hardware.CPU_INSTRUCTION_SETS:
        raise ValueError(f"{_VARIABLE}={asked!r}, choose one of {', '.join(hardware.CPU_INSTRUCTION_SETS)}")
    candidates = (asked,) if asked else hardware.supported_instruction_sets()
    problems = []
    for name in candidates:
        problem = load(name)
        if problem is None:
            return name, ""
        problems.append(problem)
    return None, problems[0] if problems else "C++ CPU kernels, need an x86-64 CPU with AVX2"


def loaded() -> dict[str, str]:
    """Every instruction set's state, for `info`: "loaded" or the problem."""
    return {name: load(name) or "loaded" for name in hardware.CPU_INSTRUCTION_SETS}


class Operators:
    """The native operators of one instruction set, as attributes."""

    def __init__(self, instruction_set: str) -> None:
        sets = instruction_set, *filter(None, [ADDS_TO.get(instruction_set)])
        self._namespaces = [getattr(torch.ops, f"pyarch_cpu_{name}") for name in sets]
        self.name = self._namespaces[0].name

    def __getattr__(self, name: str):
        for namespace in self._namespaces:
            if hasattr(namespace, name):
                setattr(self, name, getattr(namespace, name))
                return vars(self)[name]
        raise AttributeError(f"{self.name} has no operator {name}")


@cache
def operators(instruction_set: str | None = None) -> Operators:
    """The operators of one instruction set, by default of the serving one."""
    name = instruction_set or serving()[0]
    problem = load(name) if name else serving()[1]
    if problem:
        raise NotImplementedError(problem)
    return Operators(name)

"""Read figures out of what GPU compilers print: registers, stack, spills, tensor-core opcodes, widths of
accesses.

Every parser returns the same keys: registers, stack (bytes a thread), spills (instructions or registers
that move to memory), shared_bytes, tensor_core {opcode, count}, vector_loads and vector_stores (the share
of global accesses that move at least 128 bits; 1.0 where there are none).
"""

from __future__ import annotations

import re
from collections import Counter

NVIDIA_ACCESS = re.compile(r"\b(LDG|STG)\.(\S+)")
NVIDIA_SPILL = re.compile(r"\b(?:LDL|STL)\b")
NVIDIA_TENSOR_CORE = re.compile(r"\b([HIQDOF]MMA|[HIQ]GMMA|UTC\w*MMA)\b")
NVIDIA_RESOURCES = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)")
AMD_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(\S+)", re.MULTILINE)
AMD_TENSOR_CORE = re.compile(r"^\s+(v_s?mfmac?_\S+)", re.MULTILINE)


def share(wide: int, all_accesses: int) -> float:
    return round(wide / all_accesses, 3) if all_accesses else 1.0


def most_common(opcodes: list[str]) -> dict[str, str | int | None]:
    """The opcode met most often, and how many of all of them there are."""
    if not opcodes:
        return {"opcode": None, "count": 0}
    return {"opcode": Counter(opcodes).most_common(1)[0][0], "count": len(opcodes)}


def nvidia_figures(resources: str, sass: str) -> dict:
    """Figures from `cuobjdump -res-usage` and `cuobjdump -sass`.

    Raises:
        ValueError: the first text holds no resource line.
    """
    found = NVIDIA_RESOURCES.search(resources)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage printed no REG, STACK and SHARED: {resources[:200]!r}")
    registers, stack, shared = map(int, found.groups())
    accesses = NVIDIA_ACCESS.findall(sass)
    widths = {name: [kind for opcode, kind in accesses if opcode == name] for name in ("LDG", "STG")}
    wide = {
        name: sum(bool(re.search(r"\b(128|256)\b", kind)) for kind in kinds) for name, kinds in widths.items()
    }
    return {
        "registers": registers,
        "stack": stack,
        "spills": len(NVIDIA_SPILL.findall(sass)),
        "shared_bytes": shared,
        "tensor_core": most_common(NVIDIA_TENSOR_CORE.findall(sass)),
        "vector_loads": share(wide["LDG"], len(widths["LDG"])),
        "vector_stores": share(wide["STG"], len(widths["STG"])),
    }


def amd_figures(assembly: str) -> dict:
    """Figures from the AMDGCN assembly, its metadata included. Spills count vector registers only: scalar
    ones spill into lanes of a vector register, not to memory.

    Raises:
        ValueError: the metadata lacks a field.
    """

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise ValueError(f"the assembly's metadata has no .{name}")
        return int(found.group(1))

    accesses = AMD_ACCESS.findall(assembly)
    widths = {name: [kind for direction, kind in accesses if direction == name] for name in ("load", "store")}
    wide = {name: sum(kind in ("dwordx4", "b128") for kind in kinds) for name, kinds in widths.items()}
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count"),
        "shared_bytes": field("group_segment_fixed_size"),
        "tensor_core": most_common(AMD_TENSOR_CORE.findall(assembly)),
        "vector_loads": share(wide["load"], len(widths["load"])),
        "vector_stores": share(wide["store"], len(widths["store"])),
    }

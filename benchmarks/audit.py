"""Compile audit: build every Triton kernel for every target without a GPU and check what the compiler made.

    python -m benchmarks audit [--json FILE] [--targets sm_90 gfx942]

It proves that every kernel compiles with every shipped tile, spills nothing, fits the target's shared
memory, and has the 128-bit accesses and tensor-core opcodes that it declares. It proves neither numbers nor
speed.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.audit_compile import compile_figures, prepare_worker, source_of
from pyarch.triton_kernels.launch import Launch, Requirement

SCHEMA = 1
WORKERS = 2
OPERATORS = ("conv", "recurrent", "recurrent_persistent", "attention", "attention_varlen", "attention_decode")
TILE_NAMES = ("TW", "GROUP", "STAGES", "UNITS", "RESIDENT")
FIGURES = {
    "registers": int,
    "stack": int,
    "spills": int,
    "shared_bytes": int,
    "tensor_core": dict,
    "vector_loads": float,
    "vector_stores": float,
}


@dataclass(frozen=True)
class Target:
    """What Triton compiles for, and the shared memory one program may use there."""

    backend: str
    architecture: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Task:
    """One compilation: where its launch comes from, and what its row says."""

    operator: str
    case: int
    position: int
    target: str
    kernel: str
    config: str
    key: str
    requirement: Requirement
    floor: dict[str, int]


def cases_of(operator: str) -> tuple:
    return importlib.import_module(f"pyarch.triton_kernels.{operator}_audit").AUDIT


def launch_of(task: Task) -> Launch:
    return cases_of(task.operator)[task.case].launches(task.target)[task.position]


def tasks(targets: Iterable[str]) -> Iterator[Task]:
    """Every compilation once: launches that two cases share are compiled for the first."""
    digest = source_digest()
    seen = set()
    for target in targets:
        for operator in OPERATORS:
            for number, case in enumerate(cases_of(operator)):
                for position, launch in enumerate(case.launches(target)):
                    key = hashlib.sha256(f"{digest} {target} {described(launch)}".encode()).hexdigest()
                    if key in seen:
                        continue
                    seen.add(key)
                    kernel = launch.kernel.__name__
                    config = f"{case.label} | {tile_text(launch)}"
                    need, floor = case.requirement(kernel), case.floor()
                    yield Task(operator, number, position, target, kernel, config, key, need, floor)


def described(launch: Launch) -> str:
    """All that the compiler sees of a launch, besides the kernel's source."""
    return f"{launch.kernel.__name__} {source_of(launch)} {sorted(launch.options.items())}"


def tile_text(launch: Launch) -> str:
    names = [name for name in launch.constants if name.startswith("BLOCK") or name in TILE_NAMES]
    tile = " ".join(f"{name}={launch.constants[name]}" for name in names)
    return " ".join([tile, *(f"{name}={value}" for name, value in launch.options.items())])


@functools.cache
def source_digest() -> str:
    """Hash of all that decides a figure: the kernels and their tables, this audit, and the compiler's
    version."""
    import triton

    import pyarch.triton_kernels

    folder = Path(pyarch.triton_kernels.__file__).parent
    own = [Path(__file__).parent / name for name in ("audit.py", "audit_compile.py", "machine_code.py")]
    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted([*folder.glob("*.py"), *folder.glob("configs/*.json"), *own]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def problems(row: dict, requirement: Requirement) -> list[str]:
    """What is wrong with one kernel's machine code; empty where nothing is."""
    limit = TARGETS[row["target"]].shared_limit
    found = []
    if row["spills"]:
        found.append(f"spills={row['spills']}, needs 0")
    if row["stack"]:
        found.append(f"stack={row['stack']} bytes, needs 0")
    if row["shared_bytes"] > limit:
        found.append(f"shared memory={row['shared_bytes']} bytes, needs at most {limit}")
    if row["vector_loads"] < requirement.wide_loads:
        found.append(f"128-bit loads={row['vector_loads']:.0%}, declared {requirement.wide_loads:.0%}")
    if row["vector_stores"] < requirement.wide_stores:
        found.append(f"128-bit stores={row['vector_stores']:.0%}, declared {requirement.wide_stores:.0%}")
    if requirement.tensor_core and not row["tensor_core"]["count"]:
        found.append("no tensor-core opcode, declared one")
    opcode, declared = row["tensor_core"]["opcode"], requirement.opcodes.get(row["target"])
    if declared is not None and opcode != declared:
        found.append(f"tensor-core opcode={opcode}, declared {declared}")
    return found


def audit(targets: Iterable[str] = tuple(TARGETS), cache_dir: Path | str | None = None) -> list[dict]:
    """Compile what is not cached and return one row per kernel, configuration and target.

    Args:
        targets: names out of TARGETS.
        cache_dir: folder of the cache; by default $PYARCH_CACHE, $XDG_CACHE_HOME/pyarch or ~/.cache/pyarch.

    Returns:
        Rows with keys kernel, config, target, those of FIGURES, floor and problems.

    Raises:
        ValueError: an unknown target.
        RuntimeError: TRITON_INTERPRET is set, so that nothing would be compiled.
    """
    targets = tuple(targets)
    unknown = [name for name in targets if name not in TARGETS]
    if unknown:
        raise ValueError(f"targets {unknown}, needs names out of {list(TARGETS)}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set, so nothing would be compiled: unset it for the audit")
    path = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "audit.json"
    known = read_cache(path)
    wanted = list(tasks(targets))
    fresh, failures = compile_all([task for task in wanted if task.key not in known])
    if fresh:
        write_cache(path, known | fresh)
    rows = []
    for task in wanted:
        row = {"kernel": task.kernel, "config": task.config, "target": task.target, "floor": task.floor}
        if task.key in failures:
            row |= dict.fromkeys(FIGURES) | {"problems": [f"does not compile: {failures[task.key]}"]}
        else:
            row |= known.get(task.key) or fresh[task.key]
            row["problems"] = problems(row, task.requirement)
        rows.append(row)
    return rows


def compile_all(missing: list[Task]) -> tuple[dict[str, dict], dict[str, str]]:
    """Figures by key of what compiles, and the error by key of what does not."""
    fresh, failures = {}, {}
    if not missing:
        return fresh, failures
    started = time.monotonic()
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn"), initializer=prepare_worker) as pool:
        futures = {pool.submit(compile_task, task): task for task in missing}
        for done, future in enumerate(as_completed(futures), start=1):
            task = futures[future]
            error = future.exception()
            if error is None:
                fresh[task.key] = future.result()
            else:
                failures[task.key] = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - started
            print(f"[{done}/{len(missing)}] {seconds:4.0f} s {task.target} {task.kernel}", file=sys.stderr)
    return fresh, failures


def compile_task(task: Task) -> dict[str, Any]:
    """The figures of one compilation, in a worker process."""
    target = TARGETS[task.target]
    return compile_figures(launch_of(task), target.backend, target.architecture, target.warp_size)


def default_cache_dir() -> Path:
    if "PYARCH_CACHE" in os.environ:
        return Path(os.environ["PYARCH_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyarch"


def read_cache(path: Path) -> dict[str, dict]:
    """Figures by key; nothing, with a warning, where the file is not what `write_cache` writes."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored: {error}", stacklevel=2)
        return {}
    entries = (
        document.get("entries") if isinstance(document, dict) and document.get("schema") == SCHEMA else None
    )
    if not isinstance(entries, dict) or not all(map(is_figures, entries.values())):
        warnings.warn(f"{path} is ignored: it does not have the shape that this audit writes", stacklevel=2)
        return {}
    return entries


def is_figures(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), kind) for name, kind in FIGURES.items()
    )


def write_cache(path: Path, entries: dict[str, dict]) -> None:
    """Replace the file in one step, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump({"schema": SCHEMA, "entries": entries}, file)
    os.replace(file.name, path)


def print_rows(rows: list[dict]) -> None:
    """One line a row that compiled; the last two figures are the shares of 128-bit loads and stores."""
    print("target  regs stack spill shared tensor core ld128 st128")
    for row in rows:
        if row["registers"] is None:
            continue
        core = row["tensor_core"]
        opcode = f"{core['count']} {core['opcode']}" if core["count"] else "-"
        figures = (
            f"{row['registers']:4} {row['stack']:5} {row['spills']:5} {row['shared_bytes']:6} {opcode:>11}"
        )
        wide = f"{row['vector_loads']:5.0%} {row['vector_stores']:5.0%}"
        print(f"{row['target']:7} {figures} {wide}  {row['kernel']}: {row['config']}")


def main(argv: list[str]) -> int:
    """Print the rows; 1 with the list of problems where there are any."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks audit", description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args(argv)
    rows = audit(options.targets)
    print_rows(rows)
    if options.json:
        Path(options.json).write_text(
            json.dumps({"schema": SCHEMA, "rows": rows}, indent=1), encoding="utf-8"
        )
    bad = [row for row in rows if row["problems"]]
    for row in bad:
        print(f"PROBLEM {row['target']} {row['kernel']} [{row['config']}]: {'; '.join(row['problems'])}")
    print(f"{len(rows)} compilations, {len(bad)} with problems")
    return 1 if bad else 0

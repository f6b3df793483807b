"""The environment a figure was measured in, as probed facts, and the environments a run can ask for."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# glibc malloc keeps what is freed, so that both sides meet warm pages instead of a fault per 4 KiB.
ALLOCATORS = {
    "steady": {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
    "default": {},
}

INSTRUCTION_SETS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "PYARCH_CPU_ISA": "avx2"},
    "avx512": {"PYARCH_CPU_ISA": "avx512"},
    "avx512_bf16": {"PYARCH_CPU_ISA": "avx512_bf16"},
    "amx": {"PYARCH_CPU_ISA": "amx"},
}

# Measuring memory starts torch's profiler, whose library writes of every start and stop.
QUIET = {"KINETO_LOG_LEVEL": "99"}

# AMD's brand string often hides the generation: (family, model range) -> name.
AMD_GENERATIONS = (
    (23, range(0x00, 0x30), "zen1"),
    (23, range(0x30, 0x100), "zen2"),
    (25, range(0x00, 0x10), "zen3"),
    (25, range(0x10, 0x20), "zen4"),
    (25, range(0x20, 0x60), "zen3"),
    (25, range(0x60, 0x100), "zen4"),
    (26, range(0x00, 0x100), "zen5"),
)

GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
# Key of the results -> what nvidia-smi calls it; clocks in MHz, power in W, temperature in degrees Celsius.
GPU_STATE = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "sm_max_mhz": "clocks.max.sm",
    "memory_max_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
SMI_SECONDS = 10.0

NOTED_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16")
NOTED_LIBRARIES = re.compile(
    r"(gomp|iomp5|jemalloc|tcmalloc|mimalloc|pyarch|_cpu_avx|_cpu_amx|torch_cpu|torch_cuda|cudnn)"
)


def process_environment(allocator: str, instruction_set: str, threads: int | None) -> dict[str, str]:
    """This process's environment variables, changed to the allocator and instruction set a run is to have."""
    switches = {
        name for states in (ALLOCATORS, INSTRUCTION_SETS) for state in states.values() for name in state
    }
    kept = {name: value for name, value in os.environ.items() if name not in switches}
    chosen = ALLOCATORS[allocator] | INSTRUCTION_SETS[instruction_set] | QUIET
    return kept | chosen | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


def identity(device: str) -> dict:
    """What must be equal for two runs to compare, as a process under a variant's variables finds it."""
    import torch

    from pyarch import native

    return {
        "device": device_slug(device, cpu_facts()),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_kernels": " ".join(filter(None, native.serving())),
    }


def describe(device: str, commit: str | None = None) -> dict:
    """The environment block of a results file, gathered inside the measuring process."""
    import torch

    import pyarch

    found_commit, dirty = git_state()
    return identity(device) | {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or found_commit,
        "dirty": dirty,
        "cpu": cpu_facts(),
        "gpu": gpu_facts() if device == "cuda" else None,
        "affinity": sorted(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()} {'-'.join(platform.libc_ver())}",
        "huge_pages": first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "allocator_variables": {
            name: os.environ[name] for name in ALLOCATORS["steady"] if name in os.environ
        },
        "pyarch": "clone" if Path(pyarch.__file__).is_relative_to(ROOT) else "installed",
        "libraries": loaded_libraries(),
    }


def cpu_facts() -> dict:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    return {
        "vendor": fields.get("vendor_id", platform.machine()),
        "model": fields.get("model name", platform.machine()),
        "family": int(fields.get("cpu family", 0)),
        "model_number": int(fields.get("model", 0)),
        "instruction_sets": [flag for flag in NOTED_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "mhz": as_number(fields.get("cpu MHz")),
        "governor": first_line(GOVERNOR),
    }


def as_number(text: str | None) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def cpu_words(cpu: dict) -> str:
    """The CPU's model, and whether it has matrix tiles, which torch's bf16 products then run on."""
    return cpu["model"] + " with AMX" * ("amx_bf16" in cpu.get("instruction_sets", ()))


def device_slug(device: str, cpu: dict) -> str:
    """The folder name of a device under benchmarks/results, e.g. `cpu-amd-epyc-zen5-2c` or `nvidia-h200`."""
    if device == "cuda":
        return slug(gpu_facts()["name"])
    words = ["cpu", cpu["model"]]
    if cpu["vendor"] == "AuthenticAMD":
        words += [
            generation
            for family, models, generation in AMD_GENERATIONS
            if family == cpu["family"] and cpu["model_number"] in models
        ]
    return slug(" ".join([*words, f"{cpu['cores']}c"]))


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|processor|cpu @", " ", text.lower())).strip("-")


def gpu_facts() -> dict:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "state": gpu_state(str(getattr(properties, "uuid", ""))),
    }


def gpu_state(uuid: str) -> dict[str, str | float | None] | None:
    """Driver, clocks, power and temperature of a GPU as nvidia-smi tells; None where it does not."""
    which = [f"--id=GPU-{uuid}"] * bool(uuid)
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_STATE.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*query, *which], capture_output=True, text=True, check=True, timeout=SMI_SECONDS
        )
        (answer, *_) = done.stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    told = dict(zip(GPU_STATE, (field.strip() for field in answer.split(",")), strict=False))
    return {name: text if name == "driver" else as_number(text) for name, text in told.items()}


def triton_version() -> str | None:
    try:
        import triton
    except ModuleNotFoundError:
        return None
    return triton.__version__


def git_state() -> tuple[str, bool | None]:
    """The checked-out commit and whether files differ from it; ("unknown", None) outside a git checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each of these packages, None where there is none."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def first_line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def loaded_libraries() -> list[str]:
    """File names of the shared libraries in this process that bear on speed."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(None, 5)[5] for line in maps if ".so" in line and line.count("/")}
    return sorted({Path(path).name for path in paths if NOTED_LIBRARIES.search(Path(path).name)})

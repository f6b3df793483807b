"""What this installation is and can do: versions, libraries, devices, backends, and what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import pyarch
from pyarch import hardware, native
from pyarch.dispatch import BACKENDS, Backend, Call
from pyarch.ops import conv, recurrent
from pyarch.report import Table, as_json

DISTRIBUTION = "pyarch-kernels"
SCHEMA = "pyarch.info/1"
VARIABLES = ("PYARCH_BACKEND", "PYARCH_CPU_ISA", "PYARCH_BUILD_EXT", "PYARCH_CACHE")
AVAILABLE = "available"


@dataclass(frozen=True)
class Info:
    """Facts for a bug report; print it.

    Args:
        versions: of pyarch, torch, triton, python and of CUDA or ROCm in torch.
        package: the folder that pyarch was imported from.
        libraries: C++ library of each instruction set -> "loaded", or what is wrong and the fix.
        cpu: the model; instruction_sets: those of ours that it has; threads: of torch.
        devices: GPUs that torch sees, with their architecture.
        backends: name -> "available", or why not and the fix.
        variables: environment variables that pyarch reads, as set.
        warnings: what is likely not meant to be so.
    """

    versions: dict[str, str]
    package: str
    libraries: dict[str, str]
    cpu: str
    instruction_sets: tuple[str, ...]
    threads: int
    devices: tuple[str, ...]
    backends: dict[str, str]
    variables: dict[str, str]
    warnings: tuple[str, ...]

    def table(self) -> Table:
        """The facts as a table; `str(info)` is its plain text."""
        rows = [("version", name, version) for name, version in self.versions.items()]
        rows += [("package", "folder", self.package)]
        rows += [("library", f"_cpu_{name}", state) for name, state in self.libraries.items()]
        rows += [
            ("cpu", self.cpu, f"{', '.join(self.instruction_sets) or 'no AVX2'}; {self.threads} threads")
        ]
        rows += [("gpu", str(index), device) for index, device in enumerate(self.devices)]
        rows += [("gpu", "-", "torch sees none")] if not self.devices else []
        rows += [("backend", name, state) for name, state in self.backends.items()]
        rows += [("variable", name, value) for name, value in self.variables.items()]
        return Table("pyarch", ("what", "name", "value"), rows, [f"WARNING {each}" for each in self.warnings])

    def __str__(self) -> str:
        return str(self.table())

    def as_dict(self) -> dict:
        """The facts as plain lists, dicts and texts."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        return as_json(self.as_dict())


def info() -> Info:
    """Collect the facts; loads the C++ libraries if they are not loaded yet."""
    package = Path(pyarch.__file__).resolve().parent
    return Info(
        _versions(),
        str(package),
        native.loaded(),
        hardware.cpu_model(),
        hardware.supported_instruction_sets(),
        torch.get_num_threads(),
        _gpus(),
        _backends(),
        {name: value for name, value in sorted(os.environ.items()) if _concerns_us(name)},
        tuple(_warnings(package)),
    )


def _versions() -> dict[str, str]:
    versions = {
        "pyarch": pyarch.__version__,
        "torch": torch.__version__,
        "triton": hardware.triton_version() or "not installed",
        "python": platform.python_version(),
    }
    toolkit = torch.version.cuda or torch.version.hip
    return {**versions, "cuda or rocm": toolkit or "a build of torch without"}


def _gpus() -> tuple[str, ...]:
    return tuple(
        f"{torch.cuda.get_device_name(index)} ({hardware.gpu_architecture(index)})"
        for index in range(torch.cuda.device_count())
    )


def _plain_conv(where: torch.device) -> conv.ConvCall:
    shapes = (8, 96, 56, 56), (96, 1, 7, 7)
    kind = where.type, hardware.architecture(where), torch.float32
    return conv.ConvCall(*kind, *shapes, stride=(1, 1), padding=(3, 3, 3, 3), dilation=(1, 1))


def _plain_lstm(where: torch.device) -> recurrent.RecurrentCall:
    return recurrent.RecurrentCall(
        where.type,
        hardware.architecture(where),
        torch.float32,
        mode="lstm",
        steps=128,
        batch=16,
        rows=128 * 16,
        input_size=256,
        hidden_size=256,
        proj_size=0,
        directions=1,
        bias=True,
        packed=False,
        save=True,
    )


PLAIN_CALLS = {"depthwise_conv": (conv.FORWARD, _plain_conv), "recurrent": (recurrent.FORWARD, _plain_lstm)}


def _backends() -> dict[str, str]:
    """What each backend says of plain float32 calls on the device where it would run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    states = {}
    for name in BACKENDS:
        where = torch.device("cpu") if name == "cpu" else device
        said = {
            operator: _state(backend, plain(where))
            for operator, (op, plain) in PLAIN_CALLS.items()
            for backend in op.backends
            if backend.name == name
        }
        alike = len(set(said.values())) == 1
        texts = said.values() if alike else (f"{operator}: {text}" for operator, text in said.items())
        states[name] = "; ".join(dict.fromkeys(texts))
    return states


def _state(backend: Backend, call: Call) -> str:
    try:
        return "; ".join(backend.refusals(call)) or AVAILABLE
    except ValueError as error:
        # A variable holds none of its choices; whoever asks for facts wants the others too.
        return str(error)


def _concerns_us(variable: str) -> bool:
    return variable.startswith("PYARCH_") or variable == "TRITON_INTERPRET"


def _warnings(package: Path) -> list[str]:
    found = [
        f"environment variable {name} is not one that pyarch reads: {', '.join(VARIABLES)}"
        for name in sorted(os.environ)
        if name.startswith("PYARCH_") and name not in VARIABLES
    ]
    shadowed = shadowed_installation(package)
    if shadowed is not None:
        found.append(
            f"{package} hides the pyarch installed in {shadowed}, with what was built there; "
            "leave this folder, or install it: pip install -e . --no-build-isolation"
        )
    return found


def shadowed_installation(package: Path, search: list[str] | None = None) -> str | None:
    """Where a pyarch is installed that is not `package`, the one imported; None where there is none.

    Args:
        package: the imported package's folder.
        search: folders to look for installed distributions in, by default sys.path.
    """
    found = importlib.metadata.distributions(name=DISTRIBUTION, path=sys.path if search is None else search)
    installed = [place for place in map(_place_of, found) if place is not None]
    return None if package.as_uri() in installed else next(iter(installed), None)


def _place_of(distribution: importlib.metadata.Distribution) -> str | None:
    """The URI of a distribution's package: its own folder, or the source of an editable install."""
    origin = distribution.read_text("direct_url.json")
    if origin is not None:
        described = json.loads(origin)
        if described.get("dir_info", {}).get("editable"):
            return f"{described['url'].rstrip('/')}/pyarch"
    folder = Path(str(distribution.locate_file("pyarch"))).resolve()
    return folder.as_uri() if (folder / "__init__.py").is_file() else None

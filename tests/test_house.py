"""The rules of the house: who may import whom, what no source may hold, how long a file may be.

Every rule is a function of one source text: each is shown to fail on a made-up source before it judges ours.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pyarch", "triton_kernels", "csrc", "tests", "benchmarks")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
LONGEST_FILE = 600
BANNED_STEMS = {"utils", "util", "helpers", "helper", "common", "misc"}
BANNED_MODULES = {"pickle", "marshal", "shelve", "subprocess", "socket", "urllib", "http", "requests"}
BANNED_CALLS = {"eval", "exec", "os.system", "os.popen"}

# The arrows: what each room may import beside the standard library, torch and itself. Rooms without a row are
# the upper floor (swap, verify, the command line): they import each other and what is below, but no kernels.
MAY_IMPORT = {
    "pyarch.reference": set(),
    "pyarch.triton_kernels": {"triton"},
    "pyarch.models": set(),
    "pyarch.page": set(),
    "pyarch.hardware": set(),
    "pyarch.native": {"pyarch.hardware"},
    "pyarch.dispatch": {"pyarch.hardware"},
    "pyarch.ops": {"pyarch.hardware", "pyarch.native", "pyarch.dispatch", "pyarch.reference"},
    "pyarch.nn": {"pyarch.ops", "pyarch.dispatch", "pyarch.hardware"},
    "pyarch.integrations": {"pyarch.ops", "pyarch.attention_context", "transformers"},
}
KERNELS = {"pyarch.triton_kernels", "pyarch.reference"}
UPPER_FLOOR_PACKAGES = {"rich", "matplotlib"}
MAY_REGISTER_OPERATORS = {"pyarch.ops"}


def room_of(module: str) -> str:
    """The row of the table that a module belongs to: its first two names inside pyarch, its first outside."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "pyarch" else parts[0]


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """The full name of all that a source imports, anywhere in the file; relative names made absolute."""
    parent = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parent[: len(parent) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def forbidden_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports that the arrows do not allow."""
    room = room_of(module)

    def allowed(target: str) -> bool:
        if target in sys.stdlib_module_names or target in ("torch", room):
            return True
        if room in MAY_IMPORT:
            return target in MAY_IMPORT[room]
        return target in UPPER_FLOOR_PACKAGES or (target.startswith("pyarch") and target not in KERNELS)

    return sorted({name for name in imported(source, module, is_package) if not allowed(room_of(name))})


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, an empty string for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def registrations(source: str) -> list[int]:
    """Lines that reach for torch.library."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if dotted(node) == "torch.library"
        or (isinstance(node, ast.ImportFrom) and node.module == "torch.library")
        or (isinstance(node, ast.Import) and any(alias.name == "torch.library" for alias in node.names))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and any(alias.name == "library" for alias in node.names)
        )
    ]


def untrustworthy(source: str) -> list[str]:
    """What the package may not do: run text or commands, unpickle, reach the network, swallow any error."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in BANNED_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED_MODULES:
            found.append(node.module)
        elif isinstance(node, ast.Call) and dotted(node.func) in BANNED_CALLS:
            found.append(dotted(node.func))
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in caught):
                found.append(f"line {node.lineno}: except catches everything")
    return found


def shape_faults(path: Path, source: str) -> list[str]:
    """A name that says nothing, a file too long to be one story."""
    faults = []
    if path.stem in BANNED_STEMS:
        faults.append(f"the name {path.name} does not say what the file is about")
    if (lines := len(source.splitlines())) > LONGEST_FILE:
        faults.append(f"{lines} lines, at most {LONGEST_FILE}: split it")
    return faults


def sources(*folders: str) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and "build" not in path.relative_to(ROOT).parts
    ]


def module_of(path: Path) -> str:
    """The name that a file is imported by; the folder triton_kernels is pyarch.triton_kernels."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    prefix = ["pyarch"] if parts[0] == "triton_kernels" else []
    return ".".join([*prefix, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


PACKAGE = [path for path in sources("pyarch", "triton_kernels") if path.suffix == ".py"]


@pytest.mark.parametrize("path", PACKAGE, ids=named)
def test_house_arrows_point_down(path):
    assert not forbidden_imports(path.read_text(), module_of(path), path.stem == "__init__")


@pytest.mark.parametrize("path", PACKAGE, ids=named)
def test_house_only_ops_register_operators(path):
    if room_of(module_of(path)) not in MAY_REGISTER_OPERATORS:
        assert not registrations(path.read_text())


@pytest.mark.parametrize("path", PACKAGE, ids=named)
def test_house_package_is_trustworthy(path):
    assert not untrustworthy(path.read_text())


@pytest.mark.parametrize("path", sources(*FOLDERS), ids=named)
def test_house_files_tell_one_story(path):
    assert not shape_faults(path, path.read_text())


def test_house_every_room_exists():
    rooms = {room_of(module_of(path)) for path in PACKAGE}
    assert set(MAY_IMPORT) <= rooms, f"rows of MAY_IMPORT without a room: {set(MAY_IMPORT) - rooms}"


@pytest.mark.parametrize(
    "module, source, found",
    [
        ("pyarch.reference.conv", "import numpy", ["numpy"]),
        ("pyarch.reference.conv", "from pyarch import ops", ["pyarch.ops"]),
        (
            "pyarch.reference.conv",
            "from ..ops.conv import depthwise_conv",
            ["pyarch.ops.conv.depthwise_conv"],
        ),
        ("pyarch.reference.conv", "import math\nimport torch\nfrom . import other", []),
        ("pyarch.ops.conv", "def late():\n    from pyarch.nn import Conv1d", ["pyarch.nn.Conv1d"]),
        ("pyarch.ops.conv", "import pyarch.swap", ["pyarch.swap"]),
        ("pyarch.ops.conv", "import triton", ["triton"]),
        ("pyarch.ops.conv", "from pyarch.reference import conv", []),
        ("pyarch.triton_kernels.conv", "import triton.language as tl\nfrom .index import taps", []),
        ("pyarch.triton_kernels.conv", "from pyarch import hardware", ["pyarch.hardware"]),
        ("pyarch.triton_kernels.conv", "from ..hardware import probe", ["pyarch.hardware.probe"]),
        ("pyarch.nn.conv", "from pyarch.swap import swap", ["pyarch.swap.swap"]),
        ("pyarch.dispatch", "from pyarch.ops import conv", ["pyarch.ops.conv"]),
        ("pyarch.models.convnext", "from pyarch import swap", ["pyarch.swap"]),
        ("pyarch.swap", "from pyarch.retype import retype\nfrom rich.table import Table", []),
        ("pyarch.swap", "from pyarch.triton_kernels import conv", ["pyarch.triton_kernels.conv"]),
        ("pyarch.verify", "import transformers", ["transformers"]),
        ("pyarch", "from pyarch import reference", ["pyarch.reference"]),
    ],
)
def test_house_arrow_check_sees(module, source, found):
    assert forbidden_imports(source, module) == found


def test_house_arrow_check_resolves_a_package_itself():
    assert forbidden_imports("from .conv import x", "pyarch.reference", is_package=True) == []
    assert forbidden_imports("from ..ops import x", "pyarch.reference", is_package=True) == ["pyarch.ops.x"]


@pytest.mark.parametrize(
    "source, count",
    [
        ("import torch\ntorch.library.Library('a', 'DEF')", 1),
        ("import torch.library", 1),
        ("from torch import library", 1),
        ("from torch.library import custom_op", 1),
        ("import torch\ntorch.ops.load_library('x.so')", 0),
    ],
)
def test_house_registration_check_sees(source, count):
    assert len(registrations(source)) == count


@pytest.mark.parametrize(
    "source, count",
    [
        ("import pickle", 1),
        ("from urllib.request import urlopen", 1),
        ("eval('1')", 1),
        ("import os\nos.system('ls')", 1),
        ("try:\n    f()\nexcept Exception:\n    pass", 1),
        ("try:\n    f()\nexcept:\n    pass", 1),
        ("try:\n    f()\nexcept (OSError, Exception):\n    pass", 1),
        ("try:\n    f()\nexcept OSError:\n    pass", 0),
        ("model.eval()", 0),
    ],
)
def test_house_trust_check_sees(source, count):
    assert len(untrustworthy(source)) == count


def test_house_shape_check_sees():
    assert len(shape_faults(Path("pyarch/utils.py"), "x = 1\n")) == 1
    assert len(shape_faults(Path("csrc/cpu/common.h"), "\n" * (LONGEST_FILE + 1))) == 2
    assert shape_faults(Path("pyarch/dispatch.py"), "\n" * LONGEST_FILE) == []

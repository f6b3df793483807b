"""What an installation promises: one version, a cheap import, no top-level triton_kernels, clear choices."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import pyarch
from pyarch import hardware

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("triton", "rich", "matplotlib", "transformers")


@pytest.fixture(scope="module")
def build_script():
    """setup.py as a module; it calls setup() only as a script."""
    spec = importlib.util.spec_from_file_location("pyarch_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the root of the clone."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_packaging_version_is_told_once():
    declared = PYPROJECT["project"]["version"]
    assert pyarch.__version__ == declared
    assert importlib.metadata.version("pyarch-kernels") == declared


def test_packaging_lists_every_package():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "pyarch").rglob("__init__.py")
        if path.parent != ROOT
    }
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    assert listed == {*found, "pyarch.triton_kernels"}


def test_packaging_torch_is_no_build_requirement():
    required = " ".join(PYPROJECT["build-system"]["requires"])
    assert "torch" not in required


def test_packaging_import_is_cheap():
    code = f"""
import json, sys
import torch
before = set(sys.modules)
import pyarch
loaded = [name for name in {HEAVY!r} if name in set(sys.modules) - before]
print(json.dumps({{"loaded": loaded, "libraries": sorted(map(str, torch.ops.loaded_libraries))}}))
"""
    result = run_python(code, CXX="no-compiler-may-run", CC="no-compiler-may-run")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"loaded": [], "libraries": []}


def test_packaging_triton_kernels_is_no_top_level_package():
    result = run_python("import triton_kernels")
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert "pyarch.triton_kernels" in result.stderr and "pip install -e ." in result.stderr


def test_packaging_triton_kernels_come_from_this_tree():
    result = run_python("import pyarch.triton_kernels as kernels; print(kernels.__file__)")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "triton_kernels" / "__init__.py"


@pytest.mark.parametrize("choice", ["auto", "0", "1"])
def test_packaging_build_choice_is_taken(build_script, monkeypatch, choice):
    monkeypatch.setenv("PYARCH_BUILD_EXT", choice)
    assert build_script.build_choice() == choice


def test_packaging_build_choice_defaults_to_auto(build_script, monkeypatch):
    monkeypatch.delenv("PYARCH_BUILD_EXT", raising=False)
    assert build_script.build_choice() == "auto"


@pytest.mark.parametrize("choice", ["", "2", "yes", "AUTO"])
def test_packaging_unknown_build_choice_lists_the_choices(build_script, monkeypatch, choice):
    monkeypatch.setenv("PYARCH_BUILD_EXT", choice)
    with pytest.raises(SystemExit, match=re.escape(f"PYARCH_BUILD_EXT={choice!r}") + ".*auto, 0, 1"):
        build_script.build_choice()


def test_packaging_build_names_the_missing_compiler(build_script):
    reasons = build_script.refusals("no-such-compiler")
    assert any(reason.startswith("C++ compiler=no-such-compiler, needs") for reason in reasons)


def test_packaging_build_names_a_torch_too_old(build_script, monkeypatch):
    monkeypatch.setattr(build_script.importlib.metadata, "version", lambda name: "2.9.1+cpu")
    assert "torch=2.9.1+cpu, needs >= 2.11" in build_script.refusals("no-such-compiler")


def test_packaging_build_names_another_machine(build_script, monkeypatch):
    monkeypatch.setattr(build_script.platform, "machine", lambda: "aarch64")
    assert any("aarch64, needs linux x86_64" in reason for reason in build_script.refusals("c++"))


def test_packaging_each_library_needs_what_the_cpu_is_asked_for(build_script):
    """A flag that hardware.py does not look for would end in an illegal instruction."""
    built = {
        name.removeprefix("_cpu_"): {flag.removeprefix("-m").replace("-", "") for flag in flags.split()}
        for name, flags in build_script.LIBRARIES.items()
    }
    asked = {
        name: {flag.replace("_", "") for flag in needed}
        for name, needed in hardware.CPU_INSTRUCTION_SETS.items()
    }
    assert built == asked


def test_packaging_libraries_target_the_oldest_torch(build_script):
    oldest = ".".join(map(str, build_script.OLDEST_TORCH))
    assert f"torch>={oldest}" in PYPROJECT["project"]["dependencies"]
    assert build_script.TORCH_TARGET_VERSION == "0x020b000000000000ULL"


def build_wheel(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds a wheel of a copy of this repository, in the copy's dist folder."""
    for folder in ("pyarch", "triton_kernels", "csrc"):
        shutil.copytree(
            ROOT / folder,
            tree / folder,
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
            dirs_exist_ok=True,
        )
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_packaging_pure_wheel_holds_every_module_and_no_library(tmp_path):
    build = build_wheel(tmp_path, PYARCH_BUILD_EXT="0")
    assert build.returncode == 0, build.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pyarch").rglob("*.py")}
    kernels = {
        f"pyarch/{path.relative_to(ROOT)}"
        for pattern in ("*.py", "configs/*.json")
        for path in (ROOT / "triton_kernels").glob(pattern)
    }
    page = {
        str(path.relative_to(ROOT))
        for folder in ("assets", "vendor")
        for path in (ROOT / "pyarch/page" / folder).iterdir()
    }
    assert held == modules | kernels | page


def test_packaging_auto_without_a_compiler_is_pure_and_says_so(tmp_path):
    build = build_wheel(tmp_path, PYARCH_BUILD_EXT="auto", CXX="no-such-compiler")
    assert build.returncode == 0, build.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    (line,) = [line for line in build.stdout.splitlines() if line.startswith("not built:")]
    assert "pyarch._cpu_avx2" in line and "C++ compiler=no-such-compiler" in line


def test_packaging_forced_build_without_a_compiler_fails_with_the_reason(tmp_path):
    build = build_wheel(tmp_path, PYARCH_BUILD_EXT="1", CXX="no-such-compiler")
    assert build.returncode != 0
    assert "C++ compiler=no-such-compiler" in build.stderr
    assert not list((tmp_path / "dist").glob("*.whl"))

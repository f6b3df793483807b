"""info: versions, libraries, backends, variables, and the clone that hides an installation."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyarch
from pyarch import dispatch, hardware, native

OPERATOR = "info"
shadowed_installation = importlib.import_module("pyarch.info").shadowed_installation


def test_info_holds_what_a_bug_report_needs():
    facts = pyarch.info()
    assert facts.versions["torch"] == torch.__version__ and facts.versions["pyarch"] == pyarch.__version__
    assert facts.package == str(Path(pyarch.__file__).parent)
    assert facts.cpu == hardware.cpu_model()
    assert tuple(facts.backends) == dispatch.BACKENDS
    assert facts.backends["torch"] == facts.backends["reference"] == "available"
    assert facts.libraries == native.loaded()


def test_info_says_why_a_backend_is_missing(monkeypatch):
    monkeypatch.setattr(native, "serving", lambda: (None, "not built, build it so"))
    monkeypatch.setattr(hardware, "triton_version", lambda: None)
    facts = pyarch.info()
    assert facts.backends["cpu"] == "not built, build it so"
    assert facts.backends["triton"].startswith("Triton not installed, needs triton >= ")
    assert facts.versions["triton"] == "not installed"
    assert "not built, build it so" in str(facts)


def test_info_survives_a_variable_with_a_bad_value(monkeypatch):
    def refuse():
        raise ValueError("PYARCH_CPU_ISA='sse', choose one of avx2")

    monkeypatch.setattr(native, "serving", refuse)
    assert pyarch.info().backends["cpu"] == "PYARCH_CPU_ISA='sse', choose one of avx2"


def test_info_shows_variables_and_warns_of_unknown_ones(monkeypatch):
    monkeypatch.setenv("PYARCH_BUILD_EXT", "0")
    monkeypatch.setenv("PYARCH_SPEED", "11")
    facts = pyarch.info()
    assert facts.variables["PYARCH_BUILD_EXT"] == "0"
    assert [text for text in facts.warnings if "PYARCH_" in text] == [
        "environment variable PYARCH_SPEED is not one that pyarch reads: PYARCH_BACKEND, PYARCH_CPU_ISA, "
        "PYARCH_BUILD_EXT, PYARCH_CACHE"
    ]
    assert "WARNING environment variable PYARCH_SPEED" in str(facts)


def test_info_as_json():
    document = json.loads(pyarch.info().to_json())
    assert document["schema"] == "pyarch.info/1" and document["backends"]["torch"] == "available"


def installed(folder: Path, origin: dict | None = None, with_package: bool = False) -> list[str]:
    """A folder that looks like site-packages with pyarch installed."""
    (folder / "pyarch_kernels-0.1.0.dist-info").mkdir(parents=True)
    described = folder / "pyarch_kernels-0.1.0.dist-info"
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: pyarch-kernels\nVersion: 0.1.0\n")
    if origin is not None:
        (described / "direct_url.json").write_text(json.dumps(origin))
    if with_package:
        (folder / "pyarch").mkdir()
        (folder / "pyarch" / "__init__.py").write_text("")
    return [str(folder)]


def test_info_sees_a_clone_that_hides_an_installation(tmp_path):
    clone = tmp_path / "a clone" / "pyarch"
    search = installed(tmp_path / "site", with_package=True)
    assert shadowed_installation(clone, search) == (tmp_path / "site" / "pyarch").as_uri()
    assert shadowed_installation(tmp_path / "site" / "pyarch", search) is None


@pytest.mark.parametrize("end", ["", "/"])
def test_info_sees_a_clone_that_hides_an_editable_installation(tmp_path, end):
    source = tmp_path / "the source"
    origin = {"url": source.as_uri() + end, "dir_info": {"editable": True}}
    search = installed(tmp_path / "site", origin)
    assert shadowed_installation(source / "pyarch", search) is None
    assert shadowed_installation(tmp_path / "clone" / "pyarch", search) == (source / "pyarch").as_uri()


def test_info_of_a_clone_alone(tmp_path):
    assert shadowed_installation(tmp_path / "pyarch", [str(tmp_path)]) is None


def test_import_is_light():
    """Neither rich, nor Triton, nor the compiler of torch, nor a C++ library comes with `import pyarch`."""
    program = (
        "import sys, torch; before = set(sys.modules); import pyarch; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "heavy = new & {'rich', 'triton', 'transformers', 'numpy', 'matplotlib'}; "
        "print(sorted(heavy), 'torch._dynamo' in sys.modules, torch.ops.loaded_libraries)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(pyarch.__file__).parent.parent,
    )
    assert done.stdout.strip() == "[] False set()", done.stderr


def test_the_face_holds_functions_not_modules():
    assert all(callable(getattr(pyarch, name)) for name in ("swap", "swapped", "verify", "explain", "info"))
    assert set(pyarch.__all__) <= set(dir(pyarch))

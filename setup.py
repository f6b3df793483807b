"""Builds the optional CPU libraries: one shared library per instruction set, from csrc/cpu.

The libraries use torch's stable ABI and no Python API, so one binary serves many versions of both; the
package loads them with ``torch.ops.load_library``. All else about the distribution is in pyproject.toml.

``PYARCH_BUILD_EXT`` decides: ``auto`` (the default) builds what this machine can build and says what it left
out, ``0`` builds nothing, ``1`` fails where anything is missing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
AVX512_BF16 = f"{AVX512} -mavx512bf16"
LIBRARIES = {
    "_cpu_avx2": AVX2,
    "_cpu_avx512": AVX512,
    "_cpu_avx512_bf16": AVX512_BF16,
    "_cpu_amx": f"{AVX512_BF16} -mamx-tile -mamx-bf16",
}
# What a library holds whose instruction set adds something to a few sources only; pyarch/native.py knows who
# serves the rest. The others hold all.
ADDS = {"_cpu_amx": ("attention*.cpp", "gemm*.cpp", "recurrent*.cpp", "tile_registers.cpp")}
# Hidden, symbolic, not unique: no inline function of one instruction set may serve another's library.
COMPILE_FLAGS = "-O3 -g0 -std=c++20 -fno-math-errno -fno-wrapv -fvisibility=hidden -fno-gnu-unique"
# GCC 12 warns thousands of times of the deliberately undefined vectors in its own headers.
WARNING_FLAGS = "-Wno-uninitialized -Wno-maybe-uninitialized"
LINK_FLAGS = "-Wl,-Bsymbolic -Wl,--no-undefined"
OLDEST_TORCH = (2, 11)
TORCH_TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000ULL"
BUILD_CHOICES = ("auto", "0", "1")

ROOT = Path(__file__).resolve().parent


def build_choice() -> str:
    """PYARCH_BUILD_EXT, checked."""
    choice = os.environ.get("PYARCH_BUILD_EXT", "auto")
    if choice not in BUILD_CHOICES:
        raise SystemExit(f"PYARCH_BUILD_EXT={choice!r} is not known, choose {', '.join(BUILD_CHOICES)}")
    return choice


def torch_folder() -> Path:
    """Where torch's headers and libraries are, found without importing it."""
    return Path(importlib.util.find_spec("torch").origin).parent


def refusals(compiler: str) -> list[str]:
    """Every reason why nothing can be built here; an empty list means that the compiler may try."""
    reasons = []
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        reasons.append(f"platform={sys.platform} {platform.machine()}, needs linux x86_64")
    if shutil.which(compiler) is None:
        reasons.append(f"C++ compiler={compiler}, needs to be installed (CXX names another)")
    if importlib.util.find_spec("torch") is None:
        reasons.append(
            f"torch=none, needs >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} beside setuptools: "
            "install torch first, then use pip's --no-build-isolation"
        )
    else:
        version = importlib.metadata.version("torch")
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
            reasons.append(f"torch={version}, needs >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}")
    return reasons


def is_newer(made: Path, sources: list[str]) -> bool:
    """Whether a file exists and is newer than every source of it."""
    return made.exists() and all(made.stat().st_mtime > os.stat(path).st_mtime for path in sources)


def libraries() -> list[Extension]:
    """The tables above as extensions."""

    def files(*patterns: str) -> list[str]:
        found = (path for pattern in patterns for path in (ROOT / "csrc" / "cpu").glob(pattern))
        return sorted(str(path.relative_to(ROOT)) for path in found)

    headers = files("*.h")
    return [
        Extension(
            f"pyarch.{name}",
            sources=files(*ADDS.get(name, ("*.cpp",))),
            depends=[*headers, "setup.py"],
            define_macros=[
                ("PYARCH_NAMESPACE", f"pyarch{name}"),
                ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ],
            extra_compile_args=[*COMPILE_FLAGS.split(), *WARNING_FLAGS.split(), *flags.split()],
            extra_link_args=LINK_FLAGS.split(),
            libraries=["torch_cpu"],
            language="c++",
            py_limited_api=True,
        )
        for name, flags in LIBRARIES.items()
    ]


class BuildLibraries(build_ext):
    """Compiles every source once per instruction set, several at a time, and links one library for each.

    Objects and libraries are made elsewhere and renamed into place, so that a killed build leaves nothing
    that the next one could take for finished work. No lock is held: two builds at once do not meet.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extensions(self) -> None:
        required = build_choice() == "1"
        reasons = refusals(self.compiler.compiler_cxx[0])
        if reasons and required:
            raise SystemExit(f"PYARCH_BUILD_EXT=1, but no CPU library can be built: {'; '.join(reasons)}")
        if reasons:
            self.leave_out(self.extensions, "; ".join(reasons))
            return

        jobs = self.parallel if type(self.parallel) is int else len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(jobs) as pool:
            objects = {
                extension.name: [pool.submit(self.compile_one, extension, path) for path in extension.sources]
                for extension in self.extensions
            }
        for extension in list(self.extensions):
            try:
                self.link(extension, [made.result() for made in objects[extension.name]])
            except (CompileError, LinkError):
                if required:
                    raise
                self.leave_out([extension], "the compiler failed, its messages stand above")

    def compile_one(self, extension: Extension, source: str) -> str:
        """Compiles one source for one instruction set, unless its object is newer than all it was made of."""
        folder = Path(self.build_temp) / extension.name
        finished = folder / f"{Path(source).stem}.o"
        if not self.force and is_newer(finished, [source, *extension.depends]):
            return str(finished)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as elsewhere:
            (made,) = self.compiler.compile(
                [source],
                output_dir=elsewhere,
                macros=extension.define_macros,
                include_dirs=[str(torch_folder() / "include")],
                extra_postargs=extension.extra_compile_args,
            )
            os.replace(made, finished)
        return str(finished)

    def link(self, extension: Extension, objects: list[str]) -> None:
        """Links one library, unless it is newer than its objects."""
        finished = Path(self.get_ext_fullpath(extension.name))
        if not self.force and is_newer(finished, objects):
            return
        finished.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.build_temp) as elsewhere:
            made = Path(elsewhere) / finished.name
            self.compiler.link_shared_object(
                objects,
                str(made),
                libraries=extension.libraries,
                library_dirs=[str(torch_folder() / "lib")],
                extra_postargs=extension.extra_link_args,
                target_lang="c++",
            )
            os.replace(made, finished)

    def leave_out(self, extensions: list[Extension], reason: str) -> None:
        """Takes libraries out of the distribution, older builds of them too, and says so in one line."""
        names = ", ".join(extension.name for extension in extensions)
        print(f"not built: {names} ({reason}); pyarch works without, see python -m pyarch info")
        for extension in extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        self.extensions = [extension for extension in self.extensions if extension not in extensions]
        self.distribution.ext_modules = self.extensions

    def copy_extensions_to_source(self) -> None:
        for name in LIBRARIES:
            (ROOT / "pyarch" / f"{name}.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """Builds the libraries first: only then is it known whether the wheel is for one platform or for any."""

    def run(self) -> None:
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


if __name__ == "__main__":
    setup(
        ext_modules=[] if build_choice() == "0" else libraries(),
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )

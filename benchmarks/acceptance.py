"""Acceptance on a GPU: build, tests, measurements and the sanitizer, within nine minutes.

    python -m benchmarks.acceptance --results FOLDER [--commit SHA] [--only STEP ...] [--rehearse]

Every step is a process of its own with a time limit, and none depends on another's success: a step that
fails or runs out of time leaves what it has written, and the next one starts. At the end stands a short
table, and FOLDER holds acceptance.json (each step's outcome, seconds and last words), one file a suite of
benchmarks, the tests line by line, those too that time did not reach, the sanitizer's summary and log.txt.
The exit status is 0 when every step passed.

A rehearsal runs every step on a machine without a GPU: each has to get to the point where it says that there
is none.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks import results
from benchmarks.acceptance_results import counts_of, list_unreached, print_table
from benchmarks.watch import end

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("conv", "recurrent", "attention")
# Seconds of the whole, and those left for the words at the end.
LIMIT, RESERVE = 530, 10
# A process that is asked to end has so long to write what it has; one that knows its limit ends before.
GRACE, SPARE = 10, 5
TAIL = 3000
# A rehearsal shares its few cores with other work; its times say nothing.
PATIENCE = 5
NO_GPU = re.compile(r"no CUDA GPU|needs a GPU that torch sees|has no torch that sees a GPU")
# Its programs wait for each other, so it gets the GPU to itself.
PERSISTENT = "tests/test_gpu_persistent.py"
UNBUILT = (("PYARCH_BUILD_EXT", "0"),)
# Tests that run side by side leave no core for the many compilers that inductor would start for each.
ONE_COMPILER = (("TORCHINDUCTOR_COMPILE_THREADS", "1"),)


@dataclass(frozen=True)
class Step:
    """One process: arguments behind `python`, its time limit in seconds, the file it writes.

    `rehearsal`: other arguments on a machine without a GPU; `says`: whether they must name the missing GPU;
    `told_limit`: whether the process takes --limit, of seconds, and ends by itself shortly before its time.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float
    file: str | None = None
    rehearsal: tuple[str, ...] | None = None
    says: bool = True
    told_limit: bool = False
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def path(self) -> Path | None:
        return None if self.file is None else Path(self.file)


def workers() -> int:
    """Tests side by side: each compiles kernels on one core, and one core is left."""
    return max(len(os.sched_getaffinity(0)) - 1, 1)


def gpu_test_files() -> list[str]:
    """The files of tests on a GPU but for the one that needs the GPU to itself."""
    paths = [*sorted(ROOT.glob("tests/test_gpu_*.py")), *sorted(ROOT.glob("tests/test_*_triton.py"))]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return [name for name in names if name != PERSISTENT]


def steps_of(folder: Path, commit: str, suites_folder: Path) -> list[Step]:
    """All steps in the order in which they run: what decides first."""
    stem = f"{date.today().isoformat()}-{commit[:12]}"
    install = ("-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps")
    build = ("setup.py", "--quiet")
    # One dtype, so that it ends in time; python -m benchmarks.sanitizer alone takes more.
    watch = ("-m", "benchmarks.sanitizer", "--dtypes", "bf16", "--json")
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "-rfEs", "--gpu-log")
    # One test at a time, in order: see tests/gpu_session.py.
    aside = ("--dist=load", "--maxschedchunk=1", "--max-worker-restart=999")

    def tested(name: str, workers: int, limit: float, *which: str) -> Step:
        file = str(folder / f"{name}.jsonl")
        return Step(
            name,
            (*tests, file, f"-n{workers}", *aside, *which),
            limit,
            file,
            rehearsal=(*tests, file, *which),
            environment=ONE_COMPILER,
        )

    def suite(name: str) -> Step:
        file = str(suites_folder / f"{stem}-{name}.json")
        settings = ("--quick", "--device", "cuda", "--commit", commit, "--json", file)
        return Step(name, ("-m", "benchmarks", name, *settings, "--patience", "20"), 40, file)

    sanitizer = str(folder / "sanitizer.json")
    return [
        Step("machine", ("-m", "benchmarks.acceptance", "--machine"), 20),
        # Without the C++ kernels first: the GPU's do not wait for a compiler that may fail here.
        Step("install", install, 40, rehearsal=(*install, "--dry-run"), says=False, environment=UNBUILT),
        Step("build", (*build, "build_ext", "--inplace"), 60, rehearsal=(*build, "--version"), says=False),
        tested("tests", workers(), 210, *gpu_test_files()),
        tested("persistent", 1, 60, PERSISTENT),
        *(suite(name) for name in SUITES),
        Step("sanitizer", (*watch, sanitizer), 80, sanitizer, told_limit=True),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ the run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.acceptance", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--results", metavar="FOLDER", help="where everything is written")
    parser.add_argument("--commit", default="unknown", help="the commit measured")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps; the last has all the time")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="of the whole")
    parser.add_argument("--rehearse", action="store_true", help="on a machine without a GPU")
    parser.add_argument("--machine", action="store_true", help="print what this machine is, and nothing else")
    options = parser.parse_args(argv)
    if options.machine:
        return print_machine()
    folder = Path(options.results or ROOT / "build" / "acceptance")
    suites_folder = Path(options.results) if options.results or options.rehearse else default_suites_folder()
    steps = steps_of(folder, options.commit, suites_folder or folder)
    unknown = set(options.only or ()) - {step.name for step in steps}
    if unknown:
        parser.error(f"no step {sorted(unknown)}, choose of {[step.name for step in steps]}")
    wanted = [step for step in steps if not options.only or step.name in options.only]
    folder.mkdir(parents=True, exist_ok=True)
    rows = run_steps(wanted, folder, options)
    print_table(rows)
    passed = all(row["outcome"] in ("passed", "rehearsed") for row in rows)
    return 0 if passed and len(rows) == len(wanted) else 1


def default_suites_folder() -> Path:
    """Where results are committed from."""
    from benchmarks.environment import cpu_facts, device_slug

    return results.RESULTS / device_slug("cuda", cpu_facts())


def run_steps(steps: list[Step], folder: Path, options: argparse.Namespace) -> list[dict]:
    """Run what time allows and keep acceptance.json up to date after every step; Ctrl-C ends the rest."""
    begin, rows = time.monotonic(), []
    log = folder / "log.txt"
    log.write_text("")
    for step in steps:
        left = options.limit - RESERVE - (time.monotonic() - begin)
        try:
            limit = limit_of(step, options, is_last=step is steps[-1])
            rows.append(run_step(step, limit, left, log, options.rehearse))
        except KeyboardInterrupt:
            rows.append(row_of(step, "interrupted", 0.0, ""))
        document = {"schema": 1, "commit": options.commit, "rehearsed": options.rehearse, "steps": rows}
        results.write(folder / "acceptance.json", document)
        print(f"{rows[-1]['outcome']:>12}  {step.name}  {rows[-1]['seconds']:.0f} s", flush=True)
        if rows[-1]["outcome"] == "interrupted":
            break
    return rows


def limit_of(step: Step, options: argparse.Namespace, is_last: bool) -> float:
    """A step's own limit; the last of those that are asked for has all the time."""
    if options.only and is_last:
        return options.limit
    return step.limit * (PATIENCE if options.rehearse else 1)


def run_step(step: Step, limit: float, left: float, log: Path, rehearse: bool) -> dict:
    """One step's row; seconds of its own and of the whole run."""
    if step.path:
        # An earlier run's results are not this one's.
        step.path.unlink(missing_ok=True)
    if left < 1:
        return row_of(step, "no time", 0.0, "")
    limit = min(limit, left)
    arguments = step.rehearsal if rehearse and step.rehearsal else step.arguments
    if step.told_limit:
        arguments += ("--limit", f"{max(limit - SPARE, 1):.0f}")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(step.environment)
    begin = time.monotonic()
    with open(log, "a+b") as output:
        start = output.seek(0, os.SEEK_END)
        output.write(f"\n==== {step.name}: python {' '.join(arguments)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = wait(process, limit)
        except KeyboardInterrupt:
            # It leads a session of its own: the terminal's Ctrl-C does not reach it.
            ask_to_end(process)
            raise
        finally:
            end(process)
        output.seek(start)
        said = output.read().decode(errors="replace")
    outcome = (
        rehearsed(step, code, said) if rehearse else {0: "passed", None: "out of time"}.get(code, "failed")
    )
    return row_of(step, outcome, time.monotonic() - begin, said)


def rehearsed(step: Step, code: int | None, said: str) -> str:
    """A rehearsed step got to where it needs the GPU, and said so; one that needs none passed."""
    if step.says:
        return "rehearsed" if code is not None and NO_GPU.search(said) else "failed"
    return "rehearsed" if code == 0 else "failed"


def wait(process: subprocess.Popen, limit: float) -> int | None:
    """The exit status, or None for a process that was asked to end."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        ask_to_end(process)
        return None


def ask_to_end(process: subprocess.Popen) -> None:
    """Give a process and what it started a while to write what they have."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass


def row_of(step: Step, outcome: str, seconds: float, said: str) -> dict:
    list_unreached(step.path)
    counts = counts_of(step.path)
    return {
        "step": step.name,
        "outcome": outcome,
        "seconds": round(seconds, 1),
        "counts": counts,
        "file": step.path and step.path.name,
        "tail": said[-TAIL:],
    }


# ------------------------------------------------------------------------------------ the machine


def print_machine() -> int:
    """Versions, GPU and tools; 1 where torch sees no GPU."""
    import torch

    print(
        f"python {platform.python_version()}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores"
    )
    for command in (["nvidia-smi"], ["nvcc", "--version"], ["compute-sanitizer", "--version"]):
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.TimeoutExpired) as error:
            said = f"{command[0]}: {error}"
        print(said.strip())
    if not torch.cuda.is_available():
        print("no CUDA GPU that torch sees")
        return 1
    print(torch.cuda.get_device_properties(0))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

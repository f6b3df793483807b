"""Every Triton kernel under NVIDIA's compute-sanitizer: wrong accesses, races, unset memory, wrong barriers.

    python -m benchmarks.sanitizer [--json FILE] [--limit SECONDS] [--tools memcheck racecheck]

The calls of sanitizer_calls are dealt out to processes that run side by side: first without a tool, which
compiles every kernel into Triton's cache, then under each tool. A call that kills its process costs that
call alone: a fresh process goes on behind it. The exit status is 0 when every tool saw every call and found
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import results
from benchmarks.watch import end

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Without a tool: compiles, and shows which calls fail by themselves.
PLAIN = "plain"
SHARES = {PLAIN: 12} | dict.fromkeys(TOOLS, 4)
NO_GPU, LOST = 2, 70
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
TAIL = 4000
# torch's cache of memory would hide an access beyond a tensor from the tools.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sanitizer", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", metavar="FILE", help="write the summary there")
    parser.add_argument("--limit", type=float, default=180, metavar="SECONDS", help="of the whole run")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--device", default="cuda", help="of --calls")
    parser.add_argument("--calls", nargs="*", metavar="CALL", help="run these here, or all; start no tool")
    options = parser.parse_args(argv)
    if options.calls is not None:
        return run_calls(options.device, options.dtypes, options.calls)
    missing = missing_here()
    if missing:
        print(f"sanitizer: {missing}", file=sys.stderr)
        return NO_GPU
    tools = inspect(options.tools, options.dtypes, time.monotonic() + options.limit)
    print_tools(tools)
    if options.json:
        results.write(options.json, {"schema": 1, "dtypes": options.dtypes, "tools": tools})
    return int(any(tool["errors"] != 0 or tool["failures"] for tool in tools.values()))


def missing_here() -> str | None:
    """What a run lacks on this machine."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA GPU that torch sees"
    return None if sanitizer() else "no compute-sanitizer on the PATH nor in /usr/local/cuda/bin"


def sanitizer() -> str | None:
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("compute-sanitizer", path=places)


# ------------------------------------------------------------------------------------ in the watched process


def run_calls(device: str, dtypes: list[str], names: list[str]) -> int:
    """Run calls one after another; one line of JSON each, with the kernels it launched or its failure."""
    import torch

    from benchmarks.sanitizer_calls import watched
    from pyarch.triton_kernels.launch import Launch

    launched: list[str] = []
    launch = Launch.run

    def noted(self, where) -> None:
        launched.append(self.kernel.__name__)
        launch(self, where)

    Launch.run = noted
    failed = False
    for dtype in dtypes:
        for name, call in watched(device, dtype).items():
            if names and f"{name} {dtype}" not in names:
                continue
            torch.manual_seed(0)
            launched.clear()
            line = {"call": f"{name} {dtype}"}
            try:
                made = call()
                if device == "cuda":
                    torch.cuda.synchronize()
                line["finite"] = all(bool(each.isfinite().all()) for each in made if each is not None)
            # Whatever it is, it is this call's result, and the calls behind it still run.
            except Exception as error:
                line["failure"] = f"{type(error).__name__}: {error}"[:TAIL]
            line["kernels"] = sorted(set(launched))
            failed = failed or "failure" in line
            line["lost"] = "failure" in line and device == "cuda" and is_lost()
            print(json.dumps(line), flush=True)
            if line["lost"]:
                # Not by way of exit handlers, which would wait for a device that no longer answers.
                os._exit(LOST)
    Launch.run = launch
    return int(failed)


def is_lost() -> bool:
    """Whether an earlier error has taken this process's GPU away: every further call would fail with it."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# ------------------------------------------------------------------------------------ the driver


def inspect(tools: list[str], dtypes: list[str], deadline: float) -> dict[str, dict]:
    """Every call plain, then under every tool at a time: what each found."""
    from benchmarks.sanitizer_calls import CALLS

    calls = [f"{name} {dtype}" for dtype in dtypes for name in CALLS]
    found = watch([PLAIN], calls, dtypes, deadline)
    return found | watch(tools, calls, dtypes, deadline)


def watch(tools: list[str], calls: list[str], dtypes: list[str], deadline: float) -> dict[str, dict]:
    """Run all calls under each of some tools, side by side."""
    shares = [(tool, calls[n :: SHARES[tool]]) for tool in tools for n in range(SHARES[tool])]
    shares = [share for share in shares if share[1]]
    begin = time.monotonic()
    with ThreadPoolExecutor(len(shares)) as pool:
        parts = list(pool.map(lambda share: watch_share(*share, dtypes, deadline), shares))
    seconds = time.monotonic() - begin
    return {
        tool: merged([part for (name, _), part in zip(shares, parts, strict=True) if name == tool], seconds)
        for tool in tools
    }


def watch_share(tool: str, calls: list[str], dtypes: list[str], deadline: float) -> dict:
    """Run some calls under one tool, in as many processes as it takes."""
    part = {"calls": 0, "kernels": set(), "failures": {}, "errors": 0, "log": ""}
    left = list(calls)
    while left:
        code, lines, log = watched_process(tool, left, dtypes, deadline)
        for line in lines:
            left.remove(line["call"])
            part["calls"] += 1
            part["kernels"] |= set(line["kernels"])
            if "failure" in line:
                part["failures"][line["call"]] = line["failure"]
        part["errors"] += errors_in(log)
        part["log"] += log
        if tool != PLAIN and lines and code is not None and not SUMMARY.search(log):
            # A tool that could not attach lets the calls run unwatched.
            unwatched = {line["call"]: "the tool gave no summary" for line in lines}
            part["failures"] = unwatched | part["failures"]
        if code is None:
            part["failures"] |= dict.fromkeys(left, "not finished within the time limit")
            break
        if left and not (lines and lines[-1].get("lost")):
            # It died within a call and could not say so. A tool may hide the status of what it watches.
            part["failures"][left.pop(0)] = f"the process ended with status {code}: {log[-TAIL // 4 :]}"
    return part


def watched_process(
    tool: str, calls: list[str], dtypes: list[str], deadline: float
) -> tuple[int | None, list[dict], str]:
    """Exit status (None: out of time), the lines of finished calls, and what the tool and Python said."""
    command = [sys.executable, "-m", "benchmarks.sanitizer", "--dtypes", *dtypes, "--calls", *calls]
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="pyarch-sanitizer-") as folder:
        paths = {name: Path(folder) / name for name in ("lines", "words", "tool")}
        if tool != PLAIN:
            command = [sanitizer(), "--tool", tool, "--log-file", str(paths["tool"]), *command]
            environment |= UNCACHED
        with open(paths["lines"], "w") as lines, open(paths["words"], "w") as words:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=lines, stderr=words, start_new_session=True
            )
            code = wait(process, deadline)
        said = {name: path.read_text(errors="replace") for name, path in paths.items() if path.exists()}
    return code, finished_lines(said["lines"]), said["words"] + said.get("tool", "")


def wait(process: subprocess.Popen, deadline: float) -> int | None:
    """The exit status, or None for a process that had to be killed, with all that it started."""
    try:
        return process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def finished_lines(text: str) -> list[dict]:
    """The lines of JSON; a process that was killed may have left half of one, which was not finished."""
    return [
        json.loads(line) for line in text.splitlines() if line.startswith('{"call"') and line.endswith("}")
    ]


def errors_in(log: str) -> int:
    """Errors and hazards that a tool counts in its summary."""
    return sum(int(count) for count in SUMMARY.findall(log))


def merged(parts: list[dict], seconds: float) -> dict:
    """One tool's entry of the summary out of those of its processes; the tail is of the worst of them."""
    worst = max(parts, key=lambda part: (part["errors"], len(part["failures"])))
    return {
        "calls": sum(part["calls"] for part in parts),
        "kernels": sorted(set().union(*(part["kernels"] for part in parts))),
        "errors": sum(part["errors"] for part in parts),
        "failures": {name: reason for part in parts for name, reason in part["failures"].items()},
        "tail": worst["log"][-TAIL:],
        "seconds": round(seconds, 1),
    }


def print_tools(tools: dict[str, dict]) -> None:
    print(f"{'tool':10} {'calls':>5} {'kernels':>7} {'errors':>6} {'failures':>8} {'seconds':>7}")
    for name, tool in tools.items():
        counts = f"{tool['calls']:5} {len(tool['kernels']):7} {tool['errors']:6} {len(tool['failures']):8}"
        print(f"{name:10} {counts} {tool['seconds']:7.1f}")
    for name, tool in tools.items():
        for call, reason in tool["failures"].items():
            print(f"FAILED {name}: {call}: {reason.splitlines()[0][:200] if reason else ''}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

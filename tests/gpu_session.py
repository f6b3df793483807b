"""Tests on a GPU, kept apart from one another: a fault of one must neither spoil nor hide those behind it.

An illegal access takes the GPU from its process for good, and a kernel that never ends cannot be
interrupted. So under pytest-xdist a worker whose GPU is lost ends with the test that lost it, pytest-timeout
ends one that hangs, and xdist starts a fresh worker for the rest; `--max-worker-restart` must allow that.
Without xdist the session ends there.

They run in an order of which any first part has the same share of every file: bfloat16, which nothing but a
GPU proves, then the other dtypes. xdist keeps to it with `--dist load --maxschedchunk 1`; its other ways of
dealing tests out do not, and `loadscope` and `loadgroup` run a test that killed a worker again and again.

Each test on a GPU waits for its kernels, so that a fault shows where it belongs, and its failure lists the
last launches: kernel, tile, shapes and dtypes. They are kept in a file a worker, read when that worker died.
`--gpu-log FILE` gets a line of JSON with all tests that will run, then one for each finished test, at once,
so a run that is cut short has said all.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# Seconds for one test: a first contact compiles some ten kernels at a few seconds each, beside other workers.
TIMEOUT = 150
LAST_LAUNCHES = 8
OTHER_DTYPES = re.compile(r"(?<![a-z0-9])(fp16|fp32|tf32|float16|float32)(?![a-z0-9])")
LOST = 70


def pytest_addoption(parser):
    parser.addoption("--gpu-log", metavar="FILE", help="a line of JSON for each finished test on a GPU")


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        notes = Path(config.workerinput["gpu_notes"])
    else:
        config.gpu_notes = tempfile.TemporaryDirectory(prefix="pyarch-gpu-")
        notes = Path(config.gpu_notes.name)
        if (log := config.getoption("--gpu-log")) is not None:
            config.pluginmanager.register(Log(Path(log), notes), "pyarch gpu log")
    config.pluginmanager.register(Watch(notes / f"{worker_name(config)}.txt"), "pyarch gpu watch")


def pytest_unconfigure(config):
    if hasattr(config, "gpu_notes"):
        config.gpu_notes.cleanup()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """xdist's controller tells its workers where to keep their notes."""
    node.workerinput["gpu_notes"] = node.config.gpu_notes.name


def worker_name(config) -> str:
    return getattr(config, "workerinput", {}).get("workerid", "alone")


def pytest_collection_modifyitems(items):
    """Tests on a GPU go last, in the order that the head of this file gives.

    A hang of one ends its process: nothing less can end a call that waits for the device.
    """
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    elsewhere = [item for item in items if not item.get_closest_marker("gpu")]
    items[:] = elsewhere + in_order(on_gpu)
    for item in on_gpu:
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUT, method="thread"))


def in_order(items: list) -> list:
    """bfloat16, then other dtypes; in each, every file evenly, and in a file every test function."""
    ordered = []
    for is_other in (False, True):
        part = [item for item in items if bool(OTHER_DTYPES.search(item.name)) == is_other]
        files = groups_of(part, lambda item: item.nodeid.partition("::")[0])
        by_function = [groups_of(file, lambda item: item.nodeid.partition("[")[0]) for file in files]
        ordered += spread(spread(functions) for functions in by_function)
    return ordered


def groups_of(items: list, key: Callable) -> list[list]:
    """The items in lists of one key each, in the order in which they came."""
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def spread(groups: Iterable[list]) -> list:
    """All items; any first part of the result has the same share of each group."""
    placed = [((place + 0.5) / len(group), item) for group in groups for place, item in enumerate(group)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


# ------------------------------------------------------------------------------------ memory


@pytest.fixture
def gpu_memory(request):
    """The GPU's memory for a test of `gib` GiB, beside small tests; skips where the GPU has less.

    One such test runs at a time, in whichever worker: the others wait for a lock of the operating system,
    which a worker that dies lets go. Memory is handed back before and after.
    """
    needed, there = request.param, torch.cuda.get_device_properties(0).total_memory >> 30
    if there < needed:
        pytest.skip(f"GPU of {there} GiB, needs {needed}")
    with open(Path(tempfile.gettempdir()) / "pyarch-gpu-memory.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        hand_back_memory()
        yield
        hand_back_memory()


def hand_back_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------ in each worker


class Watch:
    """Notes a test's launches, waits for them, and ends the process when they have lost the GPU."""

    def __init__(self, path: Path):
        self.path = path
        self.launches: deque[str] = deque(maxlen=LAST_LAUNCHES)
        self.is_lost = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        if item.get_closest_marker("gpu") is None:
            return (yield)
        self.launches.clear()
        with self.noting():
            try:
                result = yield
                wait_for_gpu()
                return result
            except BaseException:
                self.is_lost = lost_its_gpu()
                raise

    @contextmanager
    def noting(self):
        """Note every launch inside the block."""
        from pyarch.triton_kernels.launch import Launch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "run", self.noted(Launch.run))
            yield

    def noted(self, run):
        def note_and_run(launch, device):
            self.launches.append(described(launch))
            self.path.write_text("\n".join(self.launches))
            run(launch, device)

        return note_and_run

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.when == "call" and report.failed and self.launches:
            report.sections.append(("last launches", "\n".join(self.launches)))
        if call.excinfo and item.get_closest_marker("gpu") and not item.config.getoption("usepdb"):
            # Locals of a failed test would keep its GPU memory from the tests behind it.
            traceback.clear_frames(call.excinfo.tb)
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid):
        if self.is_lost:
            end_process(nodeid)


def described(launch) -> str:
    """One launch in a line: kernel, grid, tile and options, then shape and dtype of each tensor."""
    constants = " ".join(f"{name}={value}" for name, value in (launch.constants | launch.options).items())
    tensors = " ".join(
        f"{name}={tuple(value.shape)}:{str(value.dtype).removeprefix('torch.')}"
        for name, value in launch.arguments.items()
        if isinstance(value, torch.Tensor)
    )
    return f"{launch.kernel.__name__}[{launch.grid}] {constants} | {tensors}"


def wait_for_gpu() -> None:
    """Raise what the kernels of a test did wrong after it had returned."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def lost_its_gpu() -> bool:
    """Whether the GPU no longer answers this process."""
    try:
        wait_for_gpu()
    except RuntimeError:
        return True
    return False


def end_process(nodeid: str) -> None:
    """Leave at once; exit handlers would wait for the device. xdist starts another worker."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(LOST)
    pytest.exit(f"the GPU was lost to this process in {nodeid}; run with -n 1 to go on behind it", LOST)


# ------------------------------------------------------------------------------------ in the controller


class Log:
    """A line of JSON with the tests to come, then one for each finished test, written at once."""

    def __init__(self, path: Path, notes: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.path, self.notes = path, notes
        self.has_collected = False

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        self.write_collected(ids)

    def pytest_collection_finish(self, session):
        self.write_collected([item.nodeid for item in session.items])

    def write_collected(self, tests: list[str]) -> None:
        """Once, though every worker collects."""
        if tests and not self.has_collected:
            self.has_collected = True
            self.write({"collected": list(tests)})

    def pytest_runtest_logreport(self, report):
        decides = report.when == "call" or report.outcome != "passed"
        if decides:
            self.write(self.line_of(report))

    def write(self, line: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")

    def line_of(self, report) -> dict:
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.skipped:
            line["reason"] = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            )
        if report.failed:
            line["reason"] = str(report.longrepr)[-3000:]
            line["launches"] = [text for title, text in report.sections if title == "last launches"]
            if hasattr(report, "node") and report.when == "???":
                line["launches"] += self.last_of(report.node.gateway.id)
        return line

    def last_of(self, worker: str) -> list[str]:
        """The launches of a worker that died."""
        path = self.notes / f"{worker}.txt"
        return [path.read_text()] if path.exists() else []

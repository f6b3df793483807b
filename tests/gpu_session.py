"""Tests on a GPU, kept apart from one another: a fault of one must neither spoil nor hide those behind it.

An illegal access takes the GPU from its process for good, and a kernel that never ends cannot be
interrupted. So under pytest-xdist a worker whose GPU is lost ends with the test that lost it, pytest-timeout
ends one that hangs, and xdist starts a fresh worker for the rest; `--max-worker-restart` must allow that.
Without xdist the session ends there.

Each test on a GPU waits for its kernels, so that a fault shows where it belongs, and its failure lists the
last launches: kernel, tile, shapes and dtypes. They are kept in a file a worker, read when that worker died.
`--gpu-log FILE` gets a line of JSON for each finished test, at once, so a run that is cut short has said all.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# Seconds for one test: a first contact compiles some ten kernels at a few seconds each, beside other workers.
TIMEOUT = 150
LAST_LAUNCHES = 8
OTHER_DTYPES = re.compile(r"\b(fp16|fp32|float16|float32)\b")
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
    """bfloat16 first, which nothing but a GPU proves, in case that time runs out before the end.

    A hang of a test on a GPU ends its process: nothing less can end a call that waits for the device.
    """
    items.sort(key=lambda item: bool(item.get_closest_marker("gpu") and OTHER_DTYPES.search(item.name)))
    for item in items:
        if item.get_closest_marker("gpu") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUT, method="thread"))


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
    """One line of JSON for each finished test, written at once."""

    def __init__(self, path: Path, notes: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.path, self.notes = path, notes

    def pytest_runtest_logreport(self, report):
        decides = report.when == "call" or report.outcome != "passed"
        if decides:
            with open(self.path, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(self.line_of(report)) + "\n")

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

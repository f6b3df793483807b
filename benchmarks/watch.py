"""A measuring process under watch: one that gives no sign for too long is killed with all that it started.

Its sign is a file that it touches now and then. It leads a process group of its own, so that compilers and
other children end with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import ROOT

INTERRUPTED = 130
# Beyond every exit status.
NO_ANSWER = 256
# Seldom enough that looking takes no time from what is measured.
LOOK_SECONDS = 0.2
# For a process that was told to end: what it has finished is in its file already.
GRACE_SECONDS = 5.0
# Of Linux's <sys/prctl.h>.
PR_SET_PDEATHSIG = 1


def watched(command: Sequence[str], environment: dict[str, str], signs: Path, patience: float) -> int:
    """Run a command; return its exit status, NO_ANSWER where it was killed, INTERRUPTED after Ctrl-C.

    Args:
        signs: the file that it touches; it need not exist yet.
        patience: how many seconds may pass between two signs.
    """
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return status_of(process, signs, patience)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
        return INTERRUPTED
    finally:
        end(process)


def status_of(process: subprocess.Popen, signs: Path, patience: float) -> int:
    """The exit status of a process that ends, NO_ANSWER of one that falls silent."""
    sign, since = None, time.monotonic()
    while (status := process.poll()) is None:
        latest = touched(signs)
        if latest != sign:
            sign, since = latest, time.monotonic()
        elif time.monotonic() - since > patience:
            return NO_ANSWER
        time.sleep(LOOK_SECONDS)
    return status


def touched(file: Path) -> int | None:
    """When the file was last written or touched, None where there is none."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def end(process: subprocess.Popen) -> None:
    """Kill what is left of a process that leads a group, and of that group: children may outlive it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def end_with_parent() -> None:
    """Let the system kill this process when its parent dies, even by SIGKILL; on Linux alone.

    A process that leads a group of its own would otherwise outlive a killed parent and keep its device.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

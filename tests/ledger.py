"""The ledger of a test run: what was executed, by backend and operator, and which skips nobody has allowed.

A test counts under its `backend` parameter and its operator; without that parameter, the marker
`operator(name, backend)` names both. The operator is the marker's, else the module's OPERATOR, else the
family in the file's name (test_conv_grid.py proves conv). Reasons to skip are listed in skips.txt, one
regular expression a line; a run in CI, or with --strict-skips, fails on any other.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

ALLOWED_SKIPS = Path(__file__).parent / "skips.txt"
PROOF = "pyarch_proof"


def allowed_skips(text: str) -> list[re.Pattern[str]]:
    """The patterns of a skips file: one a line, blank lines and lines that start with # left out."""
    lines = (line.strip() for line in text.splitlines())
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


def proof_of(item: pytest.Item) -> tuple[str, str] | None:
    """The (operator, backend) that a test proves, or None where it names no backend."""
    mark = item.get_closest_marker("operator")
    named = dict(zip(("operator", "backend"), mark.args, strict=False)) if mark else {}
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    backend = parameters.get("backend", named.get("backend"))
    if backend is None:
        return None
    family = item.path.stem.removeprefix("test_").split("_")[0]
    operator = named.get("operator") or getattr(item.module, "OPERATOR", family)
    return operator, getattr(backend, "name", backend)


class Ledger:
    """A pytest plugin. Under xdist the workers note the proofs and the controller reads their reports."""

    def __init__(self, allowed: list[re.Pattern[str]], strict: bool):
        self.allowed = allowed
        self.strict = strict
        self.executed: Counter[tuple[str, str]] = Counter()
        self.skipped: Counter[str] = Counter()

    @property
    def unknown(self) -> list[str]:
        """The reasons of skips that no line of skips.txt allows."""
        return [
            reason
            for reason in sorted(self.skipped)
            if not any(pattern.fullmatch(reason) for pattern in self.allowed)
        ]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        proof = proof_of(item)
        if proof:
            item.user_properties.append((PROOF, proof))

    def pytest_runtest_logreport(self, report):
        self.note_skip(report)
        if report.when == "call" and not report.skipped:
            self.executed.update(tuple(value) for name, value in report.user_properties if name == PROOF)

    def pytest_collectreport(self, report):
        self.note_skip(report)

    def note_skip(self, report) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            _, _, message = report.longrepr
            self.skipped[message.removeprefix("Skipped: ")] += 1

    def pytest_sessionfinish(self, session):
        if self.strict and self.unknown and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.executed:
            terminalreporter.section("executed tests by backend and operator")
            for line in table(self.executed):
                terminalreporter.line(line)
        if self.unknown:
            terminalreporter.section(f"skips that {ALLOWED_SKIPS.name} does not allow")
            for reason in self.unknown:
                terminalreporter.line(f"{self.skipped[reason]:6}  {reason}", red=self.strict)


def table(executed: Counter[tuple[str, str]]) -> list[str]:
    """One line an operator, one column a backend."""
    operators = sorted({operator for operator, _ in executed})
    backends = sorted({backend for _, backend in executed})
    left = max(map(len, [*operators, "operator"]))
    head = "  ".join([f"{'operator':{left}}", *(f"{backend:>9}" for backend in backends)])
    rows = (
        "  ".join([f"{operator:{left}}", *(f"{executed[operator, backend]:9}" for backend in backends)])
        for operator in operators
    )
    return [head, *rows]


def pytest_addoption(parser):
    parser.addoption(
        "--strict-skips", action="store_true", help="fail on a skip that skips.txt does not allow"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "operator(name, backend): what a test proves, for the ledger")
    strict = config.getoption("--strict-skips") or os.environ.get("CI") == "true"
    config.pluginmanager.register(Ledger(allowed_skips(ALLOWED_SKIPS.read_text()), strict), "pyarch ledger")

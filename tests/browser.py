"""Pages in a real browser: the system's Chromium, driven by playwright, which brings no browser of its own.

A machine without playwright or a browser skips what needs them; in CI that is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--no-sandbox",  # a container's root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
REFUSAL = "pages in a browser, need playwright and one of chromium, chromium-browser, google-chrome"
PATIENCE = 15_000  # milliseconds


def executable() -> str:
    """The browser on the search path; skips where one or playwright is missing, and fails there in CI."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None or importlib.util.find_spec("playwright") is None:
        if os.environ.get("CI") == "true":
            pytest.fail(REFUSAL)
        pytest.skip(REFUSAL)
    return path


@pytest.fixture(scope="module")
def browser():
    """A browser with an empty profile. Only for one module: its event loop stays in this thread meanwhile."""
    path = executable()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=ARGUMENTS, timeout=4 * PATIENCE)
        yield launched
        launched.close()


class Reader:
    """A page that was opened from disk, with all that went wrong and all that it asked for.

    `page` is playwright's; `errors` holds errors of the console and of scripts; `requests` every address.
    """

    def __init__(self, browser, path: Path, **context):
        self.context = browser.new_context(**context)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = path.resolve().as_uri()
        self.page.goto(self.address)

    @property
    def foreign(self) -> list[str]:
        """What was asked for beside the page itself and data inside it."""
        return [url for url in self.requests if url != self.address and not url.startswith("data:")]

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def read(browser):
    """`read(path, **context)` opens a page; it ends with no error on the console and no foreign request.

    The context is playwright's: color_scheme="dark", viewport={"width": 390, "height": 844} and so on.
    """
    readers = []

    def open_page(path: Path, **context) -> Reader:
        readers.append(Reader(browser, path, **context))
        return readers[-1]

    yield open_page
    for each in readers:
        each.close()
    assert not [error for each in readers for error in each.errors]
    assert not [url for each in readers for url in each.foreign]

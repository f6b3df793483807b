"""The files that a run writes, each whole or absent. Imports what draws and formats them only when asked."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results


@dataclass(frozen=True)
class Outputs:
    """Where results go: paths of files, `plot` that of a folder; `save`: each suite where it is committed."""

    json: str | None = None
    csv: str | None = None
    html: str | None = None
    plot: str | None = None
    save: bool = False

    def prepare(self) -> None:
        """Make the folders. Raises ResultsError where nothing can be written, before hours were measured."""
        files = [Path(path) for path in (self.json, self.csv, self.html) if path]
        for path in files:
            if path.is_dir():
                raise results.ResultsError(f"cannot write results: {path} is a folder")
        if self.plot and not importlib.util.find_spec("matplotlib"):
            raise results.ResultsError("cannot draw: needs matplotlib, pip install '.[plots]'")
        folders = [path.parent for path in files]
        for folder in [*folders, *([Path(self.plot)] if self.plot else [])]:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise results.ResultsError(f"cannot write results: {error}") from error
            if not os.access(folder, os.W_OK):
                raise results.ResultsError(f"cannot write results: no permission in {folder}")

    def write(self, documents: list[dict]) -> Iterator[Path]:
        """Write one file a suite where they are committed, and one of all suites for everything else.

        Each path is given when its file is there.
        """
        if self.save:
            for document in documents:
                path = results.default_path(document)
                results.write(path, document)
                yield path
        document = results.merged(documents)
        if self.json:
            results.write(self.json, document)
            yield Path(self.json)
        if self.csv:
            from benchmarks import rows_csv

            rows_csv.write(Path(self.csv), document)
            yield Path(self.csv)
        if self.html:
            from benchmarks.results_page import page_of

            page_of(document).write(Path(self.html))
            yield Path(self.html)
        if self.plot:
            from benchmarks import plots

            yield from plots.write(Path(self.plot), documents)

"""Progress of a run: a bar with the time left on a terminal, one plain line a case elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Use as a context manager; call `begin` and `end` around each case."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.console = Console(stderr=True)
        self.title = title
        self.total = total
        self.done = done
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def begin(self, name: str) -> None:
        self.bar.update(self.task, description=f"{self.title} | {name}")

    def end(self, rows: list[dict]) -> None:
        self.done += 1
        self.bar.update(self.task, completed=self.done)
        if not self.console.is_terminal:
            for row in rows:
                place = f"[{self.done}/{self.total}] {self.title} | {row['case']} {row['pass']}"
                self.console.print(f"{place}: {outcome(row)}", soft_wrap=True, markup=False, highlight=False)


def outcome(row: dict) -> str:
    """One row in a few words."""
    if row.get("failure"):
        return f"{'ABSENT' if row.get('absent') else 'FAILED'} {row['failure']}"
    times = f"{row['stock']['median_ms']:.3f} ms -> {row['ours']['median_ms']:.3f} ms"
    return f"{times}, {row['speedup']['median']:.2f}x"

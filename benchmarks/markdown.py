"""Tables in Markdown."""

from __future__ import annotations


def markdown_table(titles: list[str], body: list[list[str]]) -> str:
    """A table of one header row and its body, every cell already text."""
    lines = [titles, ["---"] * len(titles), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

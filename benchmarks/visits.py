"""The visits of a row: it is measured in several processes, minutes apart, and told as one. Imports no torch.

The rounds of one process agree better with each other than with those of the next one: a neighbour on the
machine, a clock, the places of memory and threads stay for a while. What one visit found by luck would stand
in the results for good, and every later run look slower beside it. The speedup of a row is therefore the
geometric mean over its visits, and the time that a call of ours adds the mean, each with an interval that
reaches over theirs; its other figures are those of the first visit.
"""

from __future__ import annotations

import math

from benchmarks.goals import Goal, is_met


def joined(first: list[dict], later: list[dict]) -> list[dict]:
    """The rows of all visits so far with those of a later one; what failed in it alone is a row too."""
    found = {(row["case"], row["pass"]): row for row in later if not row.get("failure")}
    failed = {row["case"] for row in first if row.get("failure")}
    rows = [row if row.get("failure") else joined_row(row, found) for row in first]
    return rows + [row for row in later if row.get("failure") and row["case"] not in failed]


def joined_row(row: dict, found: dict[tuple[str, str], dict]) -> dict:
    """A measured row with what its later visit found, if that has it, and its goal judged anew."""
    again = found.get((row["case"], row["pass"]))
    if again is None:
        return row
    visits = [*row.get("visits", [row["speedup"]]), again["speedup"]]
    mean = math.prod(each["median"] for each in visits) ** (1 / len(visits))
    told = {"speedup": over_both(row["speedup"], again["speedup"], mean), "visits": visits}
    if "added_us" in row:
        before, latest = row["added_us"], again["added_us"]
        mean = (before["median"] * (len(visits) - 1) + latest["median"]) / len(visits)
        told["added_us"] = over_both(before, latest, mean)
    row = row | told
    return row | {"met": row["goal"] and is_met(Goal(**row["goal"]), row)}


def over_both(before: dict[str, float], latest: dict[str, float], mean: float) -> dict[str, float]:
    """A figure's mean over all visits, and the interval that reaches over those until now and the latest."""
    low, high = min(before["low"], latest["low"]), max(before["high"], latest["high"])
    return {"median": mean, "low": low, "high": high}

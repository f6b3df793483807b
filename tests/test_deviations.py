"""The page of deviations names tests; they must be there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "deviations.md").read_text()


def test_deviations_name_tests_that_exist():
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGE)
    assert named
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert not missing


def test_every_row_of_the_deviations_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "torch 2.13" not in line]
    assert rows and all("::test_" in row for row in rows)


def test_readme_leads_to_the_deviations():
    assert "docs/deviations.md" in (ROOT / "README.md").read_text()

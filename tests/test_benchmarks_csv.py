"""Results as CSV: every row, failures too, under columns that stay in place."""

from __future__ import annotations

import csv

import pytest

from benchmarks import results, rows_csv

COMMITTED = sorted(results.RESULTS.glob("*/*.json"))
FAILED = {
    "case": 'a, "b"\nc',
    "pass": "all",
    "failure": "out of memory",
    "allocator": "steady",
    "isa": "native",
}


def written(tmp_path, document):
    path = tmp_path / "rows.csv"
    rows_csv.write(path, document)
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_csv_of_committed_results_loses_nothing(tmp_path, path):
    document = results.load(path)
    lines = written(tmp_path, document)
    assert len(lines) == len(document["rows"])
    for line, row in zip(lines, document["rows"], strict=True):
        assert (line["case"], line["pass"]) == (row["case"], row["pass"])
        assert line["suite"] == document["suite"] and line["device"] == document["environment"]["device"]
        assert float(line["stock.median_ms"]) == row["stock"]["median_ms"]
        assert float(line["speedup.low"]) == row["speedup"]["low"]
        for name, error in row.get("error", {}).items():
            assert float(line[f"error.{name}.ours"]) == error["ours"]


def test_csv_columns_stand_in_the_same_order_whatever_is_in_the_rows(tmp_path):
    full = results.load(COMMITTED[0])
    for document in (full, full | {"rows": full["rows"][:1]}, full | {"rows": []}, full | {"rows": [FAILED]}):
        path = tmp_path / "rows.csv"
        rows_csv.write(path, document)
        header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
        assert tuple(header[: len(rows_csv.COLUMNS)]) == rows_csv.COLUMNS
        assert tuple(header[-len(rows_csv.FACTS) :]) == rows_csv.FACTS


def test_csv_keeps_failures_and_quotes_what_needs_it(tmp_path):
    line = written(tmp_path, results.load(COMMITTED[0]) | {"rows": [FAILED]})[0]
    assert line["case"] == FAILED["case"] and line["failure"] == "out of memory"
    assert line["stock.median_ms"] == ""


def test_csv_names_the_suite_of_each_row_of_a_merged_run(tmp_path):
    rows = [FAILED | {"suite": "conv"}, FAILED | {"suite": "recurrent"}]
    lines = written(tmp_path, results.load(COMMITTED[0]) | {"suite": "all", "rows": rows})
    assert [line["suite"] for line in lines] == ["conv", "recurrent"]


def test_csv_shows_peers_and_truth_values(tmp_path):
    peer = {"median_ms": 1.5, "speedup": {"median": 2.0, "low": 1.9, "high": 2.1}, "error": 1e-7}
    row = FAILED | {"failure": None, "met": True, "peers": {"openvino": peer, "flex": {"absent": "no, none"}}}
    line = written(tmp_path, results.load(COMMITTED[0]) | {"rows": [row]})[0]
    assert line["peers.openvino.speedup.median"] == "2.0" and line["peers.flex.absent"] == "no, none"
    assert line["met"] == "true"


def test_csv_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_csv.csv.DictWriter, "writerows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rows_csv.write(tmp_path / "rows.csv", results.load(COMMITTED[0]))
    assert not list(tmp_path.iterdir())

"""Results files, the terminal table, and the README generator that reads them."""

from __future__ import annotations

import pytest
from rich.console import Console

from benchmarks import readme, results, support, table
from benchmarks.__main__ import main
from benchmarks.suites import SUITES
from pyarch import hardware, native

# -------------------------------------------------------------------------------------------- results files


def made_up_row(case="2-D k3", pass_name="fwd", allocator="steady", stock=4.0, ours=2.0, **fields):
    row = {
        "case": case,
        "pass": pass_name,
        "allocator": allocator,
        "isa": "native",
        "stock": {"median_ms": stock, "p20_ms": stock, "p80_ms": stock},
        "ours": {"median_ms": ours, "p20_ms": ours, "p80_ms": ours},
        "speedup": {"median": stock / ours, "low": stock / ours, "high": stock / ours},
        "goal": {"metric": "speedup", "value": 1.5},
        "met": stock / ours >= 1.5,
        "gb_per_s": 10.0,
        "copy_share": 0.5,
        "error": {"output": {"ours": 1e-7, "stock": 2e-7}},
        "backend": {"forward": "cpu"},
    }
    return row | fields


def made_up_results(*rows, device="cpu-test-2c", date="2026-01-02T03:04:05+00:00", gpu=None, **fields):
    environment = {
        "device": device,
        "date": date,
        "commit": "0123456789abcdef",
        "dirty": False,
        "cpu": {"model": "Test CPU", "cores": 2},
        "load_average": [0.1, 0.1, 0.1],
        "gpu": gpu,
        "threads": 2,
        "torch": "2.13.0",
        "ceilings": {"copy_gb_per_s": 20.0},
        "pyarch": "clone",
        "variants": [],
    }
    document = {"schema": 1, "suite": "conv", "environment": environment, "rows": list(rows)}
    return document | {"extent": "quick", "versus": "eager"} | fields


RECURRENT_CEILINGS = {"matmul_fp32_gflop_per_s": 139.2, "matmul_bf16_gflop_per_s": 343.0}


def made_up_recurrent_row(case="GRU T128 B16 H256 fp32", **fields):
    row = made_up_row(case, **fields)
    for name in ("gb_per_s", "copy_share"):
        del row[name]
    return row | {"us_a_step": 15.6, "gflop_per_s": 100.0, "matmul_share": 0.72}


def made_up_recurrent_results(*rows, **fields):
    document = made_up_results(*rows, suite="recurrent", **fields)
    document["environment"]["ceilings"] = RECURRENT_CEILINGS
    return document


def test_results_come_back_as_written(tmp_path):
    path = tmp_path / "cpu-test-2c" / "run.json"
    document = made_up_results(made_up_row())
    results.write(path, document)
    assert results.load(path) == document
    assert [entry.name for entry in path.parent.iterdir()] == ["run.json"]


def test_a_failed_write_leaves_the_old_file_whole_and_no_part_behind(tmp_path):
    path = tmp_path / "run.json"
    document = made_up_results(made_up_row())
    results.write(path, document)
    with pytest.raises(ValueError, match="JSON compliant"):
        results.write(path, document | {"rows": [float("nan")]})
    assert results.load(path) == document
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"schema": 1, "suite"', "not readable as JSON"),
        ("[]", "holds a list, needs an object"),
        ('{"schema": 2, "suite": "conv", "environment": {}, "rows": []}', "schema=2, needs 1"),
        ('{"schema": 1, "suite": "conv", "rows": []}', "'environment' of the file is missing"),
        (
            '{"schema": 1, "suite": "conv", "environment": {}, "rows": [{"case": "x"}]}',
            "'pass' of row 0 is missing",
        ),
        ('{"schema": 1, "suite": "conv", "environment": {}, "rows": [3]}', "row 0 is a int"),
        (
            '{"schema": 1, "suite": "conv", "environment": {}, "rows": [{"case": "x", "pass": "fwd", '
            '"allocator": "steady", "isa": "native"}]}',
            "'stock' of row 0 is missing",
        ),
        (
            '{"schema": 1, "suite": "conv", "environment": {}, "rows": [{"case": "x", "pass": "fwd", '
            '"allocator": "steady", "isa": "native", "stock": {"median_ms": 1}, "ours": {"median_ms": 1}, '
            '"speedup": {"median": "fast"}}]}',
            "'median' of 'speedup' of row 0 is missing or no number",
        ),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_corrupt_results_file_gives_one_clear_error(tmp_path, text, reason):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(results.ResultsError) as caught:
        results.load(path)
    assert reason in str(caught.value) and str(path) in str(caught.value)
    assert "delete it" in str(caught.value)


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "0", "-1.5", "null"])
def test_a_speedup_that_no_run_measures_makes_a_file_corrupt(tmp_path, figure):
    path = tmp_path / "run.json"
    results.write(path, made_up_results(made_up_row(stock=4.5, ours=2.0)))
    path.write_text(path.read_text().replace('"median": 2.25', f'"median": {figure}'))
    with pytest.raises(results.ResultsError, match="'median' of 'speedup' of row 0 .* no number above 0"):
        results.load(path)


def test_the_newest_results_of_each_device_are_taken(tmp_path):
    for number, (device, year) in enumerate([("cpu-a", 2025), ("cpu-b", 2024), ("cpu-a", 2026)]):
        document = made_up_results(made_up_row(), device=device, date=f"{year}-01-01T00:00:00+00:00")
        results.write(tmp_path / device / f"{number}.json", document)
    newest = results.newest_per_device("conv", tmp_path)
    assert [each["environment"]["date"][:4] for each in newest] == ["2026", "2024"]
    assert results.newest_per_device("attention", tmp_path) == []


def test_sweeps_and_compiled_opponents_are_not_taken_for_tables(tmp_path):
    others = (
        {},
        {"extent": "sweep"},
        {"versus": "compile"},
        {"extent": "quick", "left_out": 2},
        {"extent": "table", "interrupted": True},
    )
    for year, fields in enumerate(others, start=2024):
        document = made_up_results(made_up_row(), date=f"{year}-01-01T00:00:00+00:00", **fields)
        results.write(tmp_path / "cpu-test-2c" / f"{year}.json", document)
    (newest,) = results.newest_per_device("conv", tmp_path)
    assert newest["environment"]["date"].startswith("2024")


def test_results_of_before_there_were_opponents_are_read(tmp_path):
    document = made_up_results(made_up_row())
    del document["versus"]
    document["environment"]["copy_gb_per_s"] = document["environment"].pop("ceilings")["copy_gb_per_s"]
    results.write(tmp_path / "cpu-test-2c" / "old.json", document)
    assert results.newest_per_device("conv", tmp_path) == [document]
    text = readme.speed_section("conv", on_gpu=False, folder=tmp_path)
    assert "**2.00x** |" in text and "torch.mm" not in text


def test_the_file_of_a_run_names_its_suite_extent_and_opponent():
    def name(**fields):
        return results.default_path(made_up_results(made_up_row(), **fields)).name

    assert name() == "2026-01-02-0123456789ab-conv.json"
    assert name(suite="recurrent", extent="sweep") == "2026-01-02-0123456789ab-recurrent-sweep.json"
    assert name(versus="compile") == "2026-01-02-0123456789ab-conv-compile.json"
    assert (
        name(left_out=3) == name(left_out=3, interrupted=False) == "2026-01-02-0123456789ab-conv-quick.json"
    )
    part = "2026-01-02-0123456789ab-conv-part.json"
    assert name(left_out=3, extent="table") == name(interrupted=True) == part


def test_every_committed_file_can_be_read():
    paths = sorted(results.RESULTS.glob("*/*.json"))
    assert len(paths) >= 10
    assert all(results.load(path)["rows"] for path in paths)


def test_suites_are_merged_with_the_ceilings_of_all():
    conv = made_up_results(made_up_row(), wall_seconds=1.5, left_out=1)
    recurrent = made_up_recurrent_results(made_up_recurrent_row(), wall_seconds=2.0, left_out=2)
    for document, isa in ((conv, "native"), (recurrent, "native"), (recurrent, "avx2")):
        variant = {"allocator": "steady", "isa": isa, "ceilings": document["environment"]["ceilings"]}
        document["environment"]["variants"] += [variant]
    merged = results.merged([conv, recurrent])
    both = {"copy_gb_per_s": 20.0} | RECURRENT_CEILINGS
    assert (merged["suite"], merged["left_out"], merged["wall_seconds"]) == ("all", 3, 3.5)
    assert [(row["suite"], row["case"]) for row in merged["rows"]] == [
        ("conv", "2-D k3"),
        ("recurrent", "GRU T128 B16 H256 fp32"),
    ]
    assert merged["environment"]["ceilings"] == both
    variants = merged["environment"]["variants"]
    assert [(each["isa"], each["ceilings"]) for each in variants] == [
        ("native", both),
        ("avx2", RECURRENT_CEILINGS),
    ]
    assert conv["environment"]["ceilings"] == {"copy_gb_per_s": 20.0} and "suite" not in conv["rows"][0]
    assert results.merged([conv]) is conv


def test_ceilings_are_the_highest_that_were_measured():
    slow, fast = ({"ceilings": {"copy_gb_per_s": speed}} for speed in (10.0, 12.0))
    assert results.all_ceilings([slow, fast, {}]) == {"copy_gb_per_s": 12.0}


def test_a_loss_needs_both_a_bad_ratio_and_lost_time():
    assert table.is_loss(made_up_row(stock=1.0, ours=1.1))
    assert not table.is_loss(made_up_row(stock=1.0, ours=1.04))
    assert not table.is_loss(made_up_row(stock=0.010, ours=0.020))


def test_a_busy_machine_is_warned_of():
    environment = made_up_results()["environment"]
    assert table.variant_lines(environment) == []
    (line,) = table.variant_lines(environment | {"load_average": [1.5, 0.1, 0.1]})
    assert line.startswith("WARNING: load 1.5 on 2 cores")


def test_the_table_of_a_run_says_met_missed_and_failed(capsys):
    failure = {
        "case": "bad",
        "pass": "all",
        "allocator": "steady",
        "isa": "native",
        "failure": "ValueError: no",
    }
    rows = [made_up_row(), made_up_row(case="slow", ours=8.0), failure]
    table.print_results(made_up_results(*rows))
    text = capsys.readouterr().out
    assert "2.00 [2.00-2.00]" in text and "LOSS" in text and ">= 1.5x" in text
    assert "FAILED bad [steady, native]: ValueError: no" in text
    assert "2 rows, 1 losses" in text and "goals met 1 of 2; 1 failed" in text


def test_slower_than_stock_is_marked_and_counted(capsys):
    interval = {"median": 0.98, "low": 0.97, "high": 0.99}
    rows = [
        made_up_row(case="lost", stock=1.0, ours=2.0),
        made_up_row(case="a little", stock=1.0, ours=1.02, speedup=interval),
        made_up_row(case="even", stock=1.0, ours=1.0),
    ]
    table.print_results(made_up_results(*rows))
    lines = capsys.readouterr().out.splitlines()
    marked = {name: next(line for line in lines if name in line) for name in ("lost", "a little", "even")}
    assert "0.50 [0.50-0.50] LOSS" in marked["lost"]
    assert "0.98 [0.97-0.99] slower" in marked["a little"]
    assert "slower" not in marked["even"] and "LOSS" not in marked["even"]
    assert "3 rows, 1 losses" in lines[-1] and "1 more slower than stock by less" in lines[-1]


FULL = {
    "peers": {
        "compile": {"median_ms": 3.0, "speedup": {"median": 1.5, "low": 1.4, "high": 1.6}},
        "openvino": {"absent": "not installed"},
        "flex": {"failure": "RuntimeError"},
    },
    "roofline": {"intensity": 2.0, "bound": "memory", "share": 0.61},
    "launch_us": 21.25,
    "compile_s": 0.5,
    "matches": True,
    "peak_mib": {"ours": 2.0, "stock": 4.0},
    "graph": {"speedup": {"median": 3.25}},
}


def test_the_table_holds_every_figure_and_every_peer(capsys):
    table.print_results(made_up_results(made_up_row(**FULL), made_up_row(case="bare")))
    titles, _, full, bare = (line for line in capsys.readouterr().out.splitlines()[2:6])
    for title in ("stock ms (p20-p80)", "of roofline", "launch us", "compile s", "matches", "openvino"):
        assert title in titles
    for cell in ("4 [4-4]", "61% of memory", "21.2", "0.500", "yes", "3, 1.50x", "absent", "FAILED", "3.25"):
        assert cell in full
    assert bare.split().count("-") >= 8


def test_under_the_table_stands_why_peers_have_no_time(capsys):
    late = {"compile": {"failure": "no answer in 180 s"}, "flex": {"absent": "attention alone"}}
    rows = [
        made_up_row(case="a", **FULL),
        made_up_row(case="b", peers=late),
        made_up_row(case="c", peers=late),
    ]
    table.print_results(made_up_results(*rows))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("FAILED", "absent"))]
    assert lines == [
        "FAILED flex, a fwd [steady, native]: RuntimeError",
        "FAILED compile, 2 rows, first b fwd [steady, native]: no answer in 180 s",
        "absent openvino, a fwd [steady, native]: not installed",
        "absent flex, 2 rows, first b fwd [steady, native]: attention alone",
    ]


def test_a_middling_terminal_shows_the_more_important_columns():
    document = made_up_results(made_up_row(**FULL))

    def titles(width):
        console = Console(width=width)
        return [column.header for column in table.as_table(document, document["rows"], console).columns]

    assert set(table.NARROW_COLUMNS) == set(titles(80)) < set(titles(220)) < set(titles(400))
    assert not set(titles(220)) & set(table.WIDE_COLUMNS)
    assert {"of roofline", "compile", "stock ms (p20-p80)"} <= set(titles(220))


def test_a_gpu_is_named_with_its_clock_and_driver():
    state = {"sm_mhz": 1980.0, "driver": "580.82"}
    document = made_up_results(made_up_row(), gpu={"name": "Test GPU", "state": state})
    assert table.heading(document).startswith("Test GPU at 1980.0 MHz, driver 580.82, 2 threads, torch")
    assert table.heading(made_up_results(gpu={"name": "Old GPU"})).startswith("Old GPU, 2 threads")


def test_a_run_of_one_suite_ends_with_its_time_alone():
    document = made_up_results(made_up_row())
    assert table.sum_up_all([document], 125.0) == "measured in 2 min 5 s"
    both = [document, made_up_recurrent_results(made_up_recurrent_row())]
    line = table.sum_up_all(both, 59.6)
    assert line.startswith("conv, recurrent: 2 rows, 0 losses") and line.endswith("; measured in 1 min 0 s")


def test_the_table_shows_the_columns_that_a_suite_fills(capsys):
    def titles(document):
        table.print_results(document)
        return next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("case"))

    conv_titles = titles(made_up_results(made_up_row()))
    assert "of copy" in conv_titles and "us/step" not in conv_titles
    recurrent_titles = titles(made_up_recurrent_results(made_up_recurrent_row()))
    assert "GFLOP/s" in recurrent_titles and "of mm" in recurrent_titles and "us/step" in recurrent_titles
    assert "of copy" not in recurrent_titles and "of padded" not in recurrent_titles


def test_a_narrow_terminal_shows_the_columns_that_fit():
    document = made_up_results(made_up_row())

    def titles(width):
        console = Console(width=width)
        return [column.header for column in table.as_table(document, document["rows"], console).columns]

    assert titles(80) == list(table.NARROW_COLUMNS)
    assert set(table.NARROW_COLUMNS) < set(titles(240))


def test_the_table_of_recurrent_rows_holds_their_figures(capsys):
    padded = {side: {"median": share} for side, share in (("ours", 0.65), ("stock", 2.2))}
    row = made_up_recurrent_row(goal={"metric": "of_padded", "value": 1.1}) | {"of_padded": padded}
    table.print_results(made_up_recurrent_results(row, versus="compile"))
    text = capsys.readouterr().out
    assert "<= 1.1 padded" in text and "0.65 / 2.20" in text
    assert "15.60" in text and "72%" in text
    assert "(stock compiled)" in text and "torch.mm fp32 139 GFLOP/s, torch.mm bf16 343 GFLOP/s" in text


# --------------------------------------------------------------------------------------------------- README


SMALL_README = (
    "# Title\n<!-- generated:one -->\nold\n<!-- end:one -->\ntext\n<!-- generated:two -->\n<!-- end:two -->\n"
)


def test_readme_sections_are_replaced_and_the_rest_is_kept():
    text = readme.with_sections(SMALL_README, {"one": lambda: "first\n", "two": lambda: "second"})
    assert text == (
        "# Title\n<!-- generated:one -->\nfirst\n<!-- end:one -->\ntext\n"
        "<!-- generated:two -->\nsecond\n<!-- end:two -->\n"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SMALL_README.replace("two", "other"), r"unknown sections \['other'\], there are one, two"),
        (SMALL_README.replace("<!-- end:one -->", ""), "a marker has no partner"),
    ],
)
def test_readme_with_broken_markers_is_refused(text, reason):
    with pytest.raises(readme.ReadmeError, match=reason):
        readme.with_sections(text, {"one": str, "two": str})


def test_readme_check_tells_stale_from_fresh(tmp_path, monkeypatch, capsys):
    path = tmp_path / "README.md"
    path.write_text(SMALL_README)
    monkeypatch.setattr(readme, "SECTIONS", {"one": lambda: "first", "two": lambda: "second"})
    assert readme.regenerate(check=True, readme=path) == 1
    assert "+first" in capsys.readouterr().out
    assert path.read_text() == SMALL_README
    assert readme.regenerate(readme=path) == 0
    assert readme.regenerate(check=True, readme=path) == 0


def test_readme_speed_tables_put_allocators_beside_each_other(tmp_path):
    rows = [
        made_up_row(),
        made_up_row(allocator="default", stock=9.0, ours=3.0),
        made_up_row(pass_name="fwd+bwd", stock=50.0, ours=5.0),
        {"case": "bad", "pass": "all", "allocator": "steady", "isa": "native", "failure": "ValueError: no"},
    ]
    results.write(tmp_path / "cpu-test-2c" / "run.json", made_up_results(*rows))
    text = readme.speed_section("conv", on_gpu=False, folder=tmp_path)
    assert "Test CPU (`cpu-test-2c`), 2 threads, torch 2.13.0, 2026-01-02, commit 0123456789ab." in text
    assert "| case | forward, steady allocator | forward, default allocator | forward + backward," in text
    assert "| 2-D k3 | 4 -> 2, **2.00x** | 9 -> 3, **3.00x** | 50 -> 5, **10.00x** |" in text
    assert "| bad | failed | failed | failed |" in text
    assert readme.speed_section("conv", on_gpu=True, folder=tmp_path) == readme.NOT_MEASURED
    assert readme.speed_section("recurrent", on_gpu=False, folder=tmp_path) == readme.NOT_MEASURED


def test_readme_speaks_of_shares_only_where_rows_have_them(tmp_path):
    document = made_up_results(made_up_row())
    document["environment"]["ceilings"] |= RECURRENT_CEILINGS
    results.write(tmp_path / "cpu-test-2c" / "run.json", document)
    text = readme.speed_section("conv", on_gpu=False, folder=tmp_path)
    assert "**2.00x** |" in text and "torch.mm" not in text


def test_readme_speed_tables_of_recurrent_layers_say_what_they_are_a_share_of(tmp_path):
    padded = {side: {"median": share} for side, share in (("ours", 0.65), ("stock", 2.2))}
    rows = [made_up_recurrent_row(), made_up_recurrent_row("LSTM packed") | {"of_padded": padded}]
    results.write(tmp_path / "cpu-test-2c" / "run.json", made_up_recurrent_results(*rows))
    text = readme.speed_section("recurrent", on_gpu=False, folder=tmp_path)
    assert "(139 GFLOP/s in fp32, 343 GFLOP/s in bf16)" in text
    assert "| GRU T128 B16 H256 fp32 | 4 -> 2, **2.00x**, 72% |" in text
    assert "| LSTM packed | 4 -> 2, **2.00x**, 72%, 0.65 of its time on a padded batch |" in text


def test_readme_has_a_speed_section_for_every_suite_and_kind_of_device():
    wanted = {f"speed-{suite}-{kind}" for suite in SUITES for kind in ("cpu", "gpu")}
    assert wanted <= set(readme.SECTIONS)
    assert set(readme.MARKER.findall(readme.README.read_text())) == set(readme.SECTIONS)


def test_readme_over_a_corrupt_results_file_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("<!-- generated:speed -->\n<!-- end:speed -->\n")
    (tmp_path / "cpu-test").mkdir()
    (tmp_path / "cpu-test" / "run.json").write_text("{")
    sections = {"speed": lambda: readme.speed_section("conv", on_gpu=False, folder=tmp_path)}
    monkeypatch.setattr(readme, "SECTIONS", sections)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    assert main(["readme"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.json: not readable as JSON" in line


def test_support_matrix_quotes_the_dispatchers_refusals():
    text = support.support_matrix()
    assert "| operator | feature | triton | cuda | cpu | torch | reference |" in text
    assert "| depthwise_conv | float32 | yes |" in text
    assert "| recurrent | LSTM float32 |" in text
    assert "dtype torch.float64, needs float32, bfloat16 or float16" in text


def test_support_matrix_does_not_depend_on_what_this_machine_lacks(monkeypatch):
    monkeypatch.setattr(native, "serving", lambda: (None, "extension not built"))
    monkeypatch.setattr(hardware, "triton_version", lambda: None)
    text = support.support_matrix()
    assert "not built" not in text and "Triton not installed" not in text
    assert "| depthwise_conv | float32 | yes | no (1) | yes | yes | yes |" in text

"""The bench measures what it says: its arithmetic, and one short run of it from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import run
from kernel.config import HOME

TOOLS = ("wrk", "go", "taskset")
has_tools = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {TOOLS}")
SIZES = {"pass": 160, "chat160": 160, "chat1800": 1800, "chat20k": 20_000, "stream": 160}


@pytest.mark.parametrize("name", SIZES)
def test_a_body_has_the_size_that_its_row_names_and_a_slash_in_its_last_text(name: str) -> None:
    body = run.LOADS[name].body
    payload = json.loads(body)
    text = payload["messages"][-1]["content"] if "messages" in payload else payload["input"][0]

    assert len(body) == SIZES[name] and "/" in text and not text.startswith("/")


def test_the_table_has_medians_of_rounds_and_ratios_within_a_round() -> None:
    report = run.Report(["direct", "osp", "old"], ["old"], ["a note"])
    report.rows["a row"] = {"direct": {}, "osp": {0: 10.0, 1: 4000.0, 2: 6.0}, "old": {0: 5, 2: 6}}

    head, row, _, note = report.table().splitlines()

    assert head.split() == ["direct", "osp", "old", "osp/old"]
    assert row.split() == ["a", "row", "-", "10", "5.5", "1.50", "(1.00-2.00)"]
    assert note == "- a note"


def test_a_name_that_is_neither_a_measure_nor_a_server_ends_the_run() -> None:
    with pytest.raises(SystemExit, match="nothing: no measure, and no server here"):
        run.choose({"nothing", "pass"}, {})


@has_tools
def test_a_run_measures_each_server_and_names_those_that_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    only = "osp,naive,relay,tree,gone,pass,piece,command,latency,slow,start"
    short = ["--rounds", "1", "--seconds", "0.1", "--streams", "9", "--slow", "9"]
    other = ["--against", f"tree={HOME}", "--against", "gone=http://127.0.0.1:1"]

    run.main([*short, *other, "--only", only, "--command", "/time", "--json", str(file)])

    rows = json.loads(file.read_text())["rows"]
    (note,) = json.loads(file.read_text())["notes"][1:]
    both = {label for label, row in rows.items() if {"osp", "tree"} <= row.keys()}
    assert both == rows.keys() and len(rows) == 14
    assert all(row["osp"]["0"] > 0 for label, row in rows.items() if "per second" in label)
    cpu = rows["pass-through, 160 B: CPU us"]
    assert 3 * cpu["osp"]["0"] < cpu["naive"]["0"]
    assert "relay" in cpu and note.startswith("gone: ")
    assert "osp/tree" in capsys.readouterr().out

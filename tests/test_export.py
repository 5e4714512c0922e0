"""``hpt export``: a run's record as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cases import Fake, config, make_batches, setup
from hybrid_predict_trainer.cli import main
from hybrid_predict_trainer.experiments import export as exporter

parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet")


def written(path: Path, *records: Any, end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps(r) for r in records) + end)
    return path


def test_the_table_is_the_record_of_a_run(tmp_path: Path) -> None:
    record = tmp_path / "metrics.jsonl"
    trainer = setup("mlp", "adam").trainer(config(metrics__path=str(record)), predictor=Fake())
    trainer.fit(make_batches(1) * 40)
    trainer.metrics.sink.close()
    found, rows, notices = exporter.export(tmp_path)
    assert found == tmp_path / "metrics_history.parquet"
    assert not notices
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    table = parquet.read_table(found).to_pylist()
    assert len(table) == len(lines) == rows
    assert {line["event"] for line in lines} > {"step", "transition", "jump"}
    for row, line in zip(table, lines, strict=True):
        for name, value in row.items():
            wanted = line.get(name)
            if isinstance(wanted, dict) or (isinstance(wanted, list) and isinstance(value, str)):
                value = json.loads(value)
            assert value == wanted, name


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        ([1, None, 3], "int64", [1, None, 3]),
        ([1, 2.5], "double", [1.0, 2.5]),
        ([2**63, 1], "double", [2.0**63, 1.0]),
        ([True, None], "bool", [True, None]),
        ([True, 1], "string", ["true", "1"]),
        ([[1, 2.5], [], None], "list<element: double>", [[1.0, 2.5], [], None]),
        ([[1, None]], "list<element: double>", [[1.0, None]]),
        ([[1], "x"], "string", ["[1]", "x"]),
        ([{"a": [1]}, 10**400], "string", ['{"a": [1]}', str(10**400)]),
        ([[10**400]], "string", [f"[{10**400}]"]),
        (["ü", None], "string", ["ü", None]),
        ([None], "bool", [None]),
    ],
)
def test_every_column_has_one_type(values: list[Any], kind: str, read: list[Any], tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", *({"event": "x", "v": v} for v in values))
    found, _, _ = exporter.export(path)
    column = parquet.read_table(found).column("v")
    assert (str(column.type), column.to_pylist()) == (kind, read)


def test_what_is_torn_or_was_abandoned_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [{"event": "step", "step": n, "loss": float(n)} for n in (1, 2, 3, 2)]
    written(tmp_path / "metrics.jsonl", *steps, end='\n{"event":"st')
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "t.parquet"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 2
    assert told["notices"] == [
        "the last line of metrics.jsonl was torn and has been left out",
        "resumed: 2 records of an abandoned attempt have been left out",
    ]
    assert parquet.read_table(tmp_path / "t.parquet").column("step").to_pylist() == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "t.parquet"]


def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    good = written(tmp_path / "good.jsonl", {"event": "x"})
    (tmp_path / "torn.jsonl").write_text('{"event":"st\n{"event":"x"}\n')
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for line, said in (
        ([tmp_path / "empty"], "there is no record"), ([tmp_path / "torn.jsonl"], "torn.jsonl:1: not a JSON object"),
        ([good, "--out", tmp_path / "link"], "symbolic link"), ([good, "--out", tmp_path / "no" / "t"], "No such file"),
        ([good, "--out", tmp_path / "empty"], "not a regular file"),
    ):  # fmt: skip
        assert main(["export", *map(str, line)]) == 2
        assert said in (told := capsys.readouterr().err)
        assert told.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(good)]) == 2
    assert "hybrid-predict-trainer[parquet]" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()

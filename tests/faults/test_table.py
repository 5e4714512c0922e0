"""The table of faults, one try per case, and that a fault which is not survived is seen."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from hybrid_predict_trainer import ConfigError
from hybrid_predict_trainer.cli import hpt as cli
from hybrid_predict_trainer.experiments.faults import files, program, table, training
from hybrid_predict_trainer.experiments.faults.material import Faulty, batches
from hybrid_predict_trainer.keep import manifest

CASES = [case for case in program.all_cases() if case.quick]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_survived(case: table.Case) -> None:
    assert table.attempt(case, 3) is None


def test_names_are_told_apart() -> None:
    names = [case.name for case in program.all_cases()]
    assert len(names) == len(set(names))


def test_what_is_lost_is_counted_and_told(tmp_path: Path) -> None:
    def raising(seed: int, folder: Path) -> str | None:
        assert list(folder.iterdir()) == []
        raise ZeroDivisionError("at once")

    cases = [
        table.Case(name="good", survived="always", tries=3, trial=lambda seed, folder: None),
        table.Case(name="odd", survived="never", tries=4, trial=lambda seed, folder: "odd" if seed % 2 else None),
        table.Case(name="raising", survived="never", tries=1, trial=raising),
        table.Case(name="long", survived="never", tries=9, quick=0, trial=raising),
    ]
    found = table.run_table(cases, quick=False, only=["good", "odd", "raising"])
    assert [(r["survived"], r["lost"]) for r in found["rows"]] == [(3, 0), (2, 2), (0, 1)]
    assert not found["passed"]
    assert "seed 1: odd" in table.format_text(found)
    assert "ZeroDivisionError: at once" in table.format_text(found)
    assert [r["case"] for r in table.run_table(cases, quick=True)["rows"]] == ["good", "odd", "raising"]
    with pytest.raises(ConfigError, match="no case 'x'"):
        table.run_table(cases, only=["x"])
    document = tmp_path / "page.md"
    begin, end = "<!-- faults: begin -->", "<!-- faults: end -->"
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        table.write_markdown(document, found)
    written = document.read_text()
    assert written.startswith(f"before\n{begin}\n| case |")
    assert written.endswith(f"| **all** | | 8 | 5 | 3 |\n{end}\nafter\n")


def test_damage_that_is_not_noticed_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hashes a flipped bit in the weights gets through, and the table says so."""

    def flip_weight(folder: Path, older: Path, dice: Any) -> None:
        content = bytearray((folder / files.MODEL).read_bytes())
        content[-1] ^= 1
        (folder / files.MODEL).write_bytes(content)

    case = table.Case(name="x", survived="", tries=1, trial=files._of(flip_weight))
    assert table.attempt(case, 0) is None
    monkeypatch.setattr(manifest, "sha256_of", lambda path: manifest.read_manifest(path.parent).files[path.name].sha256)
    assert table.attempt(case, 0) == "seed 0: it was loaded"


def test_the_payload_is_no_dud(tmp_path: Path) -> None:
    pickle.loads(files.payload(tmp_path / "ran"))
    assert (tmp_path / "ran").exists()


def test_a_jump_that_is_taken_is_not_plain_training(tmp_path: Path) -> None:
    """The comparison with the plain loop can fail: a predictor that goes downhill is accepted."""

    class Downhill(Faulty):
        def predict(self, horizon: int) -> Any:
            given = super().predict(horizon)
            given.coefficients[:, -1] = -0.02
            return given

    data = [batches(0, 1, noise=0.0)[0]] * 60
    assert training.against_plain(0, data, predictor=Faulty("uphill")) is None
    assert training.against_plain(0, data, predictor=Downhill()) is not None


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["bench", "faults", "--quick", "--case", "zero gradients", "--markdown", str(tmp_path / "t.md")]
    assert cli.main(argv) == 0
    assert "zero gradients      1         1     0" in capsys.readouterr().out
    assert "| zero gradients | bitwise the plain loop | 1 | 1 | 0 |" in (tmp_path / "t.md").read_text()
    assert cli.main(["bench", "faults", "--case", "no such"]) == 2


def test_the_price_of_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "checkpoint", "--preset", "0.3M", "--batch-size", "2", "--context", "16", "--steps", "2"]
    assert cli.main([*argv, "--saves", "1", "--interval", "1000000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["async_cpu_s"] >= found["async_thread_cpu_s"] > 0
    assert found["async_pct"] == pytest.approx(100 * found["async_cpu_s"] / (1e6 * found["step_cpu_s"]))
    assert cli.main([*argv, "--saves", "1", "--interval", "1"]) != 0  # a checkpoint a step is not within a percent

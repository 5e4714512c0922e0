"""`benchmarks/gpu.sh`: the path of an accelerator at tiny size; finished units are not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
UNIT_KEYS = {"schema", "what", "unit", "status", "rc", "seconds", "limit_s", "command", "told"}

pytestmark = pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")


def run(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    package = str(ROOT / "src")
    surroundings = {
        **{k: v for k, v in os.environ.items() if k not in ("HPT_DATA_DIR", "PARTS", "OUT")},
        "PYTHON": sys.executable, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", **variables,
    }  # fmt: skip
    return subprocess.run(
        ["/bin/bash", str(SCRIPT), "--out", str(out), *arguments],
        capture_output=True, text=True, timeout=240, check=False, env=surroundings,
    )  # fmt: skip


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_the_script_parses_and_says_what_it_does() -> None:
    assert subprocess.run(["/bin/bash", "-n", str(SCRIPT)], check=False).returncode == 0
    told = subprocess.run(["/bin/bash", str(SCRIPT), "--help"], capture_output=True, text=True, check=False)
    assert told.returncode == 0
    assert "PARTS=" in told.stdout
    assert "Exit status" in told.stdout
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("arguments", [("--parts", "a z"), ("--fast",)])
def test_bad_usage_ends_with_2_and_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "unknown" in done.stderr


def test_environment_and_acceptance_then_nothing_is_run_again(tmp_path: Path) -> None:
    first = run(tmp_path, "--tiny", "--parts", "a b")
    assert first.returncode == 0, first.stderr
    environment = load(tmp_path / "a-environment.json")
    assert {"torch", "cpu", "device", "commit"} <= set(environment)
    one = load(tmp_path / "b-acceptance-s0.json")
    assert one["settings"]["trainer"]["clock"] == "claimed", "the published protocol counts claimed steps"
    assert {arm["name"] for arm in one["arms"]} >= {"plain", "hybrid"}
    judged = load(tmp_path / "acceptance.json")
    assert judged["what"] == "acceptance"
    assert {c["name"].split(",")[0] for c in judged["criteria"]} >= {"seeds", "wall-clock over conventional training"}
    for name in ("a-environment", "b-acceptance-s0"):
        status = load(tmp_path / "status" / f"{name}.json")
        assert set(status) == UNIT_KEYS
        assert (status["status"], status["rc"]) == ("done", 0)
        assert (tmp_path / "log" / f"{name}.log").exists()
    before = (tmp_path / "b-acceptance-s0.json").stat().st_mtime_ns

    (tmp_path / "a-environment.json").write_text('{"cut off')  # as a crash leaves it: no result
    stand_in = tmp_path / "python"  # what is run again is run by this one, which is quick
    stand_in.write_text(
        f'#!/bin/bash\ncase "$*" in\n  -c*json*) exec {sys.executable} "$@" ;;\n  *) echo "[1]" ;;\nesac\n'
    )
    stand_in.chmod(0o755)
    second = run(tmp_path, "--tiny", "--parts", "a b", PYTHON=str(stand_in))
    assert second.returncode == 0, second.stderr
    assert "b-acceptance-s0: there already" in second.stdout
    assert "a-environment: at most" in second.stdout
    assert (tmp_path / "b-acceptance-s0.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "a-environment.json").read_text()) == [1]


#: Stands for Python: takes the place of the package's commands, so that every way a unit can end is quick.
STAND_IN = """#!/bin/bash
case "$*" in
  *"import hybrid"*) exit 0 ;;
  -c*|*record.py*) exec {python} "$@" ;;
  *overhead*) echo "out of memory" >&2; exit 1 ;;
  *accelerator*) sleep 30 ;;
  *"parts.py stack"*) echo '{{"rows": ['; exit 0 ;;
  *resnet18*) echo "unknown preset" >&2; exit 2 ;;
  *environment*) echo "bad device" >&2; exit 2 ;;
  *) echo '{{"ok": true}}' ;;
esac
"""

ENDS = [
    ("a", "a-environment", "failed", 2, "bad device"),
    ("d", "d-overhead", "failed", 1, "out of memory"),
    ("d", "d-accelerator", "timeout", 124, ""),
    ("e", "e-stack", "failed", 65, ""),
    ("f", "f-resnet18", "skipped", 2, "unknown preset"),
    ("f", "f-bert", "done", 0, ""),
]


def test_a_unit_that_fails_is_recorded_and_does_not_stop_the_others(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    out = tmp_path / "out"
    done = run(out, "--parts", "a d e f", PYTHON=str(stand_in), LIMIT_S="1", DEVICE="cuda")
    assert done.returncode == 1
    for _, unit, status, rc, told in ENDS:
        found = load(out / "status" / f"{unit}.json")
        assert (found["status"], found["rc"], found["told"]) == (status, rc, told), unit
        assert (out / f"{unit}.json").exists() == (status == "done")
    assert not list(out.glob("*.part")), "nothing half-written is left"
    assert "--preset resnet18" in " ".join(load(out / "status" / "f-resnet18.json")["command"])

    only_skipped = run(out, "--parts", "f", PYTHON=str(stand_in), LIMIT_S="5", DEVICE="cuda")
    assert only_skipped.returncode == 0, "what cannot be had here is no failure"
    assert "f-bert: there already" in only_skipped.stdout


def test_no_unit_is_started_that_there_is_no_time_for(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    done = run(tmp_path / "out", "--parts", "b", PYTHON=str(stand_in), BUDGET_S="5")
    assert done.returncode == 1
    assert done.stdout.count("no time left, call again to go on") == 3
    assert not list((tmp_path / "out" / "status").iterdir())

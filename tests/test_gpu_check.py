"""`benchmarks/gpu_check.sh`: the path of an accelerator at tiny size, and that a check can fail."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(not Path("/bin/bash").exists(), reason="needs bash")


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["/bin/bash", str(SCRIPT), "--out", str(out), *arguments],
        capture_output=True, text=True, timeout=120, check=False, env=surroundings,
    )  # fmt: skip


def test_the_script_parses_and_says_what_it_does() -> None:
    assert subprocess.run(["/bin/bash", "-n", str(SCRIPT)], check=False).returncode == 0
    told = subprocess.run(["/bin/bash", str(SCRIPT), "--help"], capture_output=True, text=True, check=False)
    assert told.returncode == 0
    assert "Exit status" in told.stdout
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("arguments", [("--fast",), ("--only", "of")])
def test_bad_usage_ends_with_2_and_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(tmp_path, "--tiny", *arguments)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "unknown" in done.stderr


def test_some_checks_through_the_script(tmp_path: Path) -> None:
    done = run(tmp_path, "--tiny", "--only", "off,nan")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert found["off"]["bitwise_the_plain_loop"] == {"adamw": True, "sgd": True}
    assert found["nan"]["num_skipped_steps"] >= 1
    assert (tmp_path / "gpu_check.md").read_text() in done.stdout
    assert "off: holds" in (tmp_path / "gpu_check.log").read_text()


@pytest.mark.parametrize("name", ["resume", "offload", "reading"])
def test_the_others_hold_at_tiny_size(checks: ModuleType, name: str) -> None:
    found = checks.CHECKS[name](checks.Check("cpu", checks.TINY))
    assert found["ok"], found
    bitwise = [value for key, value in found.items() if key.startswith("bitwise")]
    assert all(bitwise)


def test_memory_is_held_against_its_bounds(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"settings": "default", "ratio": 1.6, "in_weights": ""},
        {"settings": "offload", "ratio": 1.02, "in_weights": ""},
    ]
    monkeypatch.setattr(checks.memory, "held", lambda **_: rows)
    assert not checks.held(checks.Check("cpu", checks.Size(preset="0.3M", batch=2, context=16)))["ok"]
    rows[0]["ratio"] = 1.4
    assert checks.held(checks.Check("cpu", checks.Size(preset="0.3M", batch=2, context=16)))["ok"]


def test_a_step_that_is_not_undone_is_seen(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_predict_trainer.cycle.real_step._usable", lambda *_: True)
    assert not checks.nan(checks.Check("cpu", checks.TINY))["ok"]


def test_a_trainer_that_is_not_off_is_seen(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checks.Check("cpu", checks.TINY)
    honest = made.trainer

    def meddling(model: Any, *args: Any, **settings: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).mul_(1 + 1e-6)
        return honest(model, *args, **settings)

    monkeypatch.setattr(made, "trainer", meddling)
    assert not checks.off(made)["ok"]


def test_what_was_found_is_told_in_a_table(checks: ModuleType) -> None:
    told = checks.markdown({"off": {"ok": True, "x": {"a": True}}, "nan": {"ok": False, "ratio": math.pi}})
    assert "| off | yes | x (a True) |" in told
    assert "| nan | no | ratio 3.142 |" in told

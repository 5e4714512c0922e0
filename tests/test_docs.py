"""What the documents show has to run, and what they name has to exist."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from functools import reduce
from pathlib import Path

import pytest

from hybrid_predict_trainer import HybridTrainerConfig
from hybrid_predict_trainer.config.toml import valid_keys

ROOT = Path(__file__).parents[1]


def test_the_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {"__name__": "readme"})
    accepted, loss = capsys.readouterr().out.split()
    assert int(accepted) > 0
    assert 0 < float(loss) < 1e-3


def test_the_example_predictor_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "custom_predictor.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "num_jumps_accepted" in done.stdout


def documented() -> dict[str, object]:
    """Key -> default, of every row of docs/configuration.md; `.name` shares the table of the key before it."""
    found: dict[str, object] = {}
    for line in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`([a-z_.*0-9]+)`", cells[0])
        table = names[0].rpartition(".")[0]
        values = tomllib.loads(f"x = [{cells[1]}]")["x"] if cells[1] else [None] * len(names)
        assert len(names) == len(values), line
        found |= {table + n if n.startswith(".") else n: v for n, v in zip(names, values, strict=True)}
    return found


def test_every_key_is_documented_with_its_default() -> None:
    rows, keys = documented(), valid_keys()
    tables = [key.removesuffix("*") for key in rows if key.endswith(".*")]
    assert {key for key in rows if not key.endswith("*")} <= set(keys)
    assert [key for key in keys if key not in rows and not key.startswith(tuple(tables))] == []
    for key, default in rows.items():
        if not key.endswith("*"):
            value = reduce(getattr, keys[key], HybridTrainerConfig())
            assert (list(value) if isinstance(value, tuple) else value) == default, key


@pytest.mark.parametrize(
    "name", ["README.md", "LOG.md", "docs/design.md", "docs/configuration.md", "docs/benchmarks.md"]
)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / name).parent.joinpath(target).exists(), target

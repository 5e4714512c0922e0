"""What the documents show has to run, and what they name has to exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_predict_trainer.toml_io import valid_keys

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


def test_documented_keys_exist() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:training|predictor|gate|divergence|metrics|checkpoint|corrector)\.[a-z_.]+)`", text))
    assert named - set(valid_keys()) <= {"divergence.loss_sigma_threshold"}
    tables = {k.rpartition(".")[0] for k in valid_keys()}
    assert all(f"`{t}" in text for t in tables if t not in ("predictor.dmd", "predictor.mlp", "predictor.rssm"))


@pytest.mark.parametrize(
    "name", ["README.md", "LOG.md", "docs/design.md", "docs/configuration.md", "docs/benchmarks.md"]
)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / name).parent.joinpath(target).exists(), target

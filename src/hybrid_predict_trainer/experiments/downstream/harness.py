"""Tasks of lm-evaluation-harness (MMLU, HellaSwag, ARC) on an exported Hugging Face checkpoint, in a process apart.

The harness fetches its data from a hub: where that cannot be reached, or it is not installed, one line says so.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...records import ConfigError
from ...safe_files import read_json_object
from ...tasks.base import missing_extra

TASKS = ("mmlu", "hellaswag", "arc_easy", "arc_challenge")
MODULE, EXTRA = "lm_eval", "harness"
#: Words of an error that mean that the data could not be fetched.
UNREACHABLE = ("ConnectionError", "MaxRetryError", "OfflineModeIsEnabled", "LocalEntryNotFoundError",
               "couldn't connect", "Couldn't reach",
               "Name or service not known", "Temporary failure in name resolution")  # fmt: skip


def evaluate(
    checkpoint: Path, out: Path, tasks: Sequence[str] = TASKS, *, limit: int | None = None, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Run the harness.

    Args:
        checkpoint: Folder with ``config.json``, weights and a tokenizer, as ``save_pretrained`` writes it.
        out: Folder of the harness's own results.
        tasks: Names of the harness.
        limit: Examples per task; None: all.
        device: As torch names it.

    Returns:
        Task -> metric -> value.

    Raises:
        ModuleNotFoundError: the harness is not installed.
        ConfigError: there is no checkpoint, the hub cannot be reached, or the harness failed.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise missing_extra(MODULE, EXTRA)
    if not (checkpoint / "config.json").is_file():
        raise ConfigError(f"{checkpoint}: has no config.json; export the model with save_pretrained(folder)")
    command = [
        sys.executable, "-m", MODULE, "--model", "hf", "--model_args", f"pretrained={checkpoint}",
        "--tasks", ",".join(tasks), "--device", device, "--output_path", str(out),
    ]  # fmt: skip
    command += [] if limit is None else ["--limit", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(failure(done.stderr))
    return results_in(out)


def failure(errors: str) -> str:
    """One line about why the harness failed, from its standard error."""
    if any(word in errors for word in UNREACHABLE):
        return "lm-evaluation-harness cannot reach the hub that its data come from; run it once where it can"
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no message")
    return f"lm-evaluation-harness failed: {last[:300]}"


def results_in(out: Path) -> dict[str, dict[str, float]]:
    """The newest results that the harness wrote below a folder.

    Raises:
        ConfigError: there are none.
    """
    files = sorted(out.rglob("results*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ConfigError(f"{out}: lm-evaluation-harness has written no results there")
    found: Any = read_json_object(files[-1]).get("results")
    if not isinstance(found, dict):
        raise ConfigError(f"{files[-1]}: has no results")
    return {
        str(task): {name: float(v) for name, v in figures.items() if isinstance(v, int | float)}
        for task, figures in json.loads(json.dumps(found)).items() if isinstance(figures, dict)
    }  # fmt: skip

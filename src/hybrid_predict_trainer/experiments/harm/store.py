"""Runs on disk, one small JSON file each: a table can be continued, and plain runs outlive a change of ours."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ...safe_files import read_json, write_text
from ...tell.sinks import jsonable
from ..regimes.cache import code_of, digest
from .runs import Arm, Result
from .settings import Setting

#: Bump where the meaning of a stored run changes.
FORMAT = 1

#: Fields of a setting that change nothing of a run.
_SAID_ONLY = ("name", "about", "ms", "num_seeds", "quick_steps", "quick_seeds", "rate")


def identity(setting: Setting, seed: int, arm: Arm, tag: str | None) -> dict[str, Any]:
    """Everything that determines a run.

    Args:
        setting: What is trained.
        seed: Of weights and order.
        arm: Which.
        tag: Of our runs, in place of the fingerprint of our source code; nothing to plain runs.
    """
    trained = {name: value for name, value in asdict(setting).items() if name not in _SAID_ONLY}
    ours = (tag or code_of("hybrid")) if arm == "ours" else None
    return {
        "format": FORMAT, "torch": str(torch.__version__).partition("+")[0], "setting": trained, "seed": seed,
        "arm": arm, "tag": ours,
    }  # fmt: skip


class Store:
    """The folder of runs."""

    def __init__(self, folder: Path, tag: str | None = None) -> None:
        """Args: folder: made when needed.  tag: as in :func:`identity`."""
        self.folder, self.tag = folder, tag

    def path(self, setting: Setting, seed: int, arm: Arm) -> Path:
        """Of a run's file, readable as far as a name can be."""
        return self.folder / f"{setting.name}-{arm}-s{seed}-{digest(identity(setting, seed, arm, self.tag))}.json"

    def get(self, setting: Setting, seed: int, arm: Arm) -> Result | None:
        """The stored run; None where there is none, or its file is damaged or another's."""
        try:
            found = read_json(self.path(setting, seed, arm))
            if found["key"] != jsonable(identity(setting, seed, arm, self.tag)):
                return None
            told = {f.name: found["result"][f.name] for f in fields(Result)}
            return Result(**{**told, "loss": math.nan if told["loss"] is None else float(told["loss"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, setting: Setting, seed: int, arm: Arm, result: Result) -> None:
        """Write it whole or not at all."""
        value = jsonable({"key": identity(setting, seed, arm, self.tag), "result": asdict(result)})
        write_text(self.path(setting, seed, arm), json.dumps(value, allow_nan=False) + "\n")

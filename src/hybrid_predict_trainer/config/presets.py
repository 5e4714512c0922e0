"""Named starting points: complete TOML files in ``preset_files/``, each number with its source.

A file holds every setting, so that it can be copied and passed to ``--config``, and a table ``[about]`` that settings
do not read: ``title``, what the preset is for; ``sources``, where the numbers come from that are not the defaults;
``not_taken``, what the source says besides and why it is not followed; ``run``, a task and a length to try it with.
A preset *sets* the keys that it has a source for, and leaves the others as they stand.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "preset_files"

#: The name that stands for a choice, not for a file.
AUTO = "auto"

#: What comes with a source of closed-form moves: few real steps, and no budget that would stop it.
CLOSED_FORM: Mapping[str, Any] = {
    "predictor.type": "gauss_newton", "predictor.window": 1, "training.warmup_steps": 20,
    "training.correct_steps": 0, "training.confidence_threshold": 0.0, "gate.overhead_budget_exact": 1.0,
    "gate.holdout_fraction": 0.0, "gate.max_backoff": 1,
}  # fmt: skip

#: Least number of trained weights -> preset, largest first (methodology document, section "Presets").
BY_WEIGHTS = ((3_000_000_000, "large"), (500_000_000, "medium"), (100_000_000, "small"))


@functools.cache
def names() -> tuple[str, ...]:
    """Of all presets, in the order of the alphabet."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


@functools.cache
def preset_table(name: str) -> Mapping[str, Any]:
    """A preset's file as it stands.

    Raises:
        KeyError: there is none of this name.
    """
    if name not in names():
        raise KeyError(name)
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def about(name: str) -> Mapping[str, Any]:
    """What a preset's file says about itself."""
    found: Mapping[str, Any] = preset_table(name)["about"]
    return found


class _Presets(Mapping[str, Mapping[str, Any]]):
    """Name -> the keys that a preset sets, and their values; files are read when they are asked for."""

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        """Values by dotted key."""
        whole = preset_table(name)
        return {key: functools.reduce(lambda t, part: t[part], key.split("."), whole) for key in about(name)["sources"]}

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(names())

    def __len__(self) -> int:
        """How many there are."""
        return len(names())


PRESETS: Mapping[str, Mapping[str, Any]] = _Presets()


def choose(num_weights: int, *, full_batch: bool = False, steps_per_epoch: int | None = None) -> tuple[str | None, str]:
    """What ``auto`` stands for: a preset's name, None for the defaults, and why.

    Args:
        num_weights: Weights that train.
        full_batch: Every batch is the whole data set, as far as is known.
        steps_per_epoch: Steps of a pass over the data; None: not known, or data never come again.
    """
    if full_batch:
        return "full_batch", "every batch is the whole data set, so that losses are exact"
    told = f"{num_weights:,} weights train"
    for least, name in BY_WEIGHTS:
        if num_weights >= least:
            return name, f"{told}, {least:,} or more"
    again = "" if steps_per_epoch is None else f", a pass over the data takes {steps_per_epoch:,} steps"
    return None, f"{told}, fewer than {BY_WEIGHTS[-1][0]:,}{again}"

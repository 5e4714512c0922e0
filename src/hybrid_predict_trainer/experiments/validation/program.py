"""``hpt validate``: the experiments over seeds, kept as they end, with verdicts."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...records import ConfigError
from ...safe_files import read_json_object, write_text
from ...tell.sinks import jsonable
from ..arms.environment import environment
from . import gradients, losses
from .criteria import over_seeds
from .plain import SCALES, Recorded, Scale, record

#: Bump where the meaning of a stored result changes.
FORMAT = 1
EXPERIMENTS = (1, 2)
#: In the protocol's order.
ORDER = (2, 1)
NAMES = {1: "gradient structure", 2: "loss prediction"}
MIN_SEEDS = 2


def validate(
    experiments: Sequence[int], scale_name: str, num_seeds: int, out: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Run what is missing, and judge.

    Args:
        experiments: Of :data:`EXPERIMENTS`.
        scale_name: A key of ``plain.SCALES``.
        num_seeds: At least two: one has no interval.
        out: Folder of the results, one file per experiment and seed.
        tell: Takes a line about every run.

    Returns:
        JSON-able: criteria over seeds with verdicts, figures, decisions.

    Raises:
        ConfigError: one seed, or a stored result is damaged or of another version.
    """
    if num_seeds < MIN_SEEDS:
        raise ConfigError(f"--seeds {num_seeds}: one seed has no interval, give at least {MIN_SEEDS}")
    scale = SCALES[scale_name]
    wanted = [n for n in ORDER if n in experiments]
    logs: dict[int, list[dict[str, Any]]] = {n: [] for n in wanted}
    for seed in range(num_seeds):
        recorded: Recorded | None = None
        for number in wanted:
            path = out / f"experiment{number}-{scale_name}-seed{seed}.json"
            if not path.exists():
                recorded = recorded or record(scale, seed, tell)
                write_text(path, json.dumps(jsonable(_log(number, scale_name, scale, seed, recorded)), indent=1) + "\n")
            logs[number].append(_stored(path, scale))
    found = {str(n): _judged(n, logs[n]) for n in wanted}
    return {"scale": scale_name, "seeds": num_seeds, "environment": environment(), "experiments": found}


def _log(number: int, scale_name: str, scale: Scale, seed: int, recorded: Recorded) -> dict[str, Any]:
    """One experiment of one seed, in the protocol's template for logs."""
    if number == 1:
        bars = gradients.criteria(recorded.gradients, recorded.updates, seed)
        results = {**gradients.figures(recorded.gradients, recorded.updates, scale.batch_size),
                   "sketch_error": recorded.sketch_error}  # fmt: skip
    else:
        results = losses.measure(recorded.losses, recorded.rates)
        bars = losses.criteria(results)
        results["decision"] = losses.decision(results["predictors"]["law"]["r2"])
    held = [bar.to_json() for bar in bars]
    return {
        "format": FORMAT, "experiment_id": f"exp_{number:03d}", "hypothesis": "H1", "seed": seed,
        "date": datetime.date.today().isoformat(), "config": {"scale": scale_name, **asdict(scale)},
        "results": results, "criteria": held,
        "conclusion": "; ".join(f"{bar.name}: {bar.verdict}" for bar in bars),
    }  # fmt: skip


def _stored(path: Path, scale: Scale) -> dict[str, Any]:
    """A result as it was written.

    Raises:
        ConfigError: it is damaged, or of another version or size.
    """
    found = read_json_object(path)
    if found.get("format") != FORMAT:
        raise ConfigError(f"{path}: is a result of another version; choose another --out")
    config = found.get("config")
    if not isinstance(config, dict) or any(config.get(k) != v for k, v in asdict(scale).items()):
        raise ConfigError(f"{path}: is a result at other sizes; choose another --out")
    if not isinstance(found.get("criteria"), list) or not isinstance(found.get("results"), dict):
        raise ConfigError(f"{path}: is damaged; delete it to run this seed again")
    return found


def _judged(number: int, logs: list[dict[str, Any]]) -> dict[str, Any]:
    bars = over_seeds([log["criteria"] for log in logs])
    return {"name": NAMES[number], "criteria": bars, "results": [log["results"] for log in logs]}


def text(found: dict[str, Any]) -> str:
    """What a person reads."""
    lines = []
    for number, result in found["experiments"].items():
        lines.append(f"experiment {number}: {result['name']}, {found['scale']}, {found['seeds']} seeds")
        for bar in result["criteria"]:
            ends = bar["interval"]
            interval = "" if ends is None else f" [{ends[0]:.3g}, {ends[1]:.3g}]"
            lines.append(
                f"  {bar['verdict']:<6}  {bar['name']}: {bar['value']:.3g}{interval}, bar {bar['sense']} "
                f"{bar['bar']:g}; {bar['control_name']}: {bar['control']:.3g}"
            )
        for key in ("verdict", "decision"):
            said = [r[key] for r in result["results"] if key in r]
            lines += [f"  {key}: {', '.join(said)}"] if said else []
    return "\n".join(lines)


def markdown(found: dict[str, Any]) -> str:
    """The tables of docs/validation.md."""
    lines = []
    for number, result in found["experiments"].items():
        lines += [f"### Experiment {number}: {result['name']}", ""]
        lines += ["| criterion | measured | 95 % interval | bar | control | verdict |", "|---|---|---|---|---|---|"]
        for bar in result["criteria"]:
            ends = "-" if bar["interval"] is None else f"{bar['interval'][0]:.3g} to {bar['interval'][1]:.3g}"
            lines.append(
                f"| {bar['name']} | {bar['value']:.3g} | {ends} | {bar['sense']} {bar['bar']:g} | "
                f"{bar['control_name']}: {bar['control']:.3g} | {bar['verdict']} |"
            )
        lines.append("")
    return "\n".join(lines)

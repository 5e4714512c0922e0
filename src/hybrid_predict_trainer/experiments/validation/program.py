"""``hpt validate``: the experiments over seeds, kept as they end, with verdicts, stop rules and hypotheses."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...records import ConfigError
from ...safe_files import read_json_object, write_text
from ...tell.sinks import jsonable
from ..arms.environment import environment
from . import collection, corrections, deltas, gradients, hybrid, hypotheses, losses
from .criteria import Criterion, over_seeds
from .plain import SCALES, Recorded, Scale, record
from .stored import read_from

#: Bump where the meaning of a stored result changes.
FORMAT = 2
EXPERIMENTS = (1, 2, 3, 4, 5)
#: In the protocol's order: what is cheap and decides first, the whole run last.
ORDER = (2, 1, 3, 5, 4)
NAMES = {
    1: "gradient structure", 2: "loss prediction", 3: "weight-delta prediction", 4: "hybrid training",
    5: "residual correction",
}  # fmt: skip
HYPOTHESIS = {1: "H1", 2: "H1", 3: "H2", 4: "H2", 5: "H3"}
NEXT = {
    "continue": "go on with the next experiment", "refine": "refine the model, or shorten the horizon, and repeat",
    "stop": "the bar is out of reach here: this use of predictions is to be given up or moved to another regime",
}  # fmt: skip
MIN_SEEDS = 2
Tell = Callable[[str], None]


def validate(
    experiments: Sequence[int], scale_name: str, num_seeds: int, out: Path, tell: Tell, *, collect: bool = False
) -> dict[str, Any]:
    """Run what is missing, and judge.

    Args:
        experiments: Of :data:`EXPERIMENTS`.
        scale_name: A key of ``plain.SCALES``.
        num_seeds: At least two: one has no interval.
        out: Folder of the results, one file per experiment and seed.
        tell: Takes a line about every run.
        collect: Keep what every run leaves below ``out / "collected"``.

    Returns:
        JSON-able: criteria over seeds with verdicts, figures, decisions, hypotheses.

    Raises:
        ConfigError: one seed, or a stored result is damaged or of another version.
    """
    if num_seeds < MIN_SEEDS:
        raise ConfigError(f"--seeds {num_seeds}: one seed has no interval, give at least {MIN_SEEDS}")
    scale = SCALES[scale_name]
    wanted, left = [n for n in ORDER if n in experiments], out / "collected"
    logs: dict[int, list[dict[str, Any]]] = {n: [] for n in wanted}
    for seed in range(num_seeds):
        recorded: Recorded | None = None
        for number in wanted:
            path = out / f"experiment{number}-{scale_name}-seed{seed}.json"
            if not path.exists():
                began = time.process_time()
                if number in (1, 2):
                    recorded = recorded or record(scale, seed, tell)
                found = _log(number, scale_name, scale, seed, recorded, tell)
                found["cpu_seconds"] = time.process_time() - began
                if collect:  # before the result, which says that all is there
                    collection.collect(left / f"{scale_name}-seed{seed}", number, found, recorded)
                write_text(path, json.dumps(jsonable(found), indent=1) + "\n")
            elif collect and number != 4 and not collection.kept(left / f"{scale_name}-seed{seed}", number):
                tell(f"{path}: is kept, and its run left nothing: delete it, or choose another --out, to --collect")
            logs[number].append(_stored(path, number, scale))
    with read_from(out):
        found = {str(n): _judged(n, logs[n]) for n in wanted}
    return {
        "scale": scale_name, "seeds": num_seeds, "environment": environment(), "experiments": found,
        "hypotheses": hypotheses.verdicts(found),
    }  # fmt: skip


def kept(out: Path) -> list[dict[str, Any]]:
    """What a folder holds, judged as :func:`validate` does, one object per scale; nothing is run.

    Raises:
        ConfigError: a result is damaged, or of another version or size.
    """
    found = []
    for scale_name, scale in SCALES.items():
        logs = {
            n: [_stored(path, n, scale) for path in sorted(out.glob(f"experiment{n}-{scale_name}-seed*.json"))]
            for n in ORDER
        }
        with read_from(out):
            judged = {str(n): _judged(n, own) for n, own in logs.items() if own}
        if judged:
            seeds = max(len(own) for own in logs.values())
            found.append({"scale": scale_name, "seeds": seeds, "experiments": judged,
                          "hypotheses": hypotheses.verdicts(judged)})  # fmt: skip
    return found


def kept_of(out: Path, scale_name: str) -> dict[str, Any]:
    """What a folder holds of one scale.

    Raises:
        ConfigError: nothing, or a result is damaged, or of another version or size.
    """
    for found in kept(out):
        if found["scale"] == scale_name:
            return found
    raise ConfigError(f"{out}: holds no results of --scale {scale_name}; the same command without --kept makes them")


def _measure(
    number: int, scale: Scale, seed: int, recorded: Recorded | None, tell: Tell
) -> tuple[dict[str, Any], list[Criterion]]:
    """Results and bars of one experiment of one seed; the stop rule's decision is among the results."""
    results: dict[str, Any]
    if number == 1:
        assert recorded is not None
        bars = gradients.criteria(recorded.gradients, recorded.updates, seed)
        results = {**gradients.figures(recorded.gradients, recorded.updates, scale.batch_size or 1),
                   "sketch_error": recorded.sketch_error,
                   "decision": gradients.decision({bar.name: bar for bar in bars})}  # fmt: skip
        return results, bars
    if number == 2:
        assert recorded is not None
        results = losses.measure(recorded.losses, recorded.rates)
        return {**results, "decision": losses.decision(results)}, losses.criteria(results)
    if number == 3:
        results = deltas.measure(scale, seed, tell)
        return {**results, "decision": deltas.decision(results)}, deltas.criteria(results)
    if number == 4:
        results = hybrid.measure(scale, seed, tell)
        return {**results, "decision": hybrid.decision(results)}, hybrid.criteria(results)
    results = corrections.measure(scale, seed, tell)
    return {**results, "decision": corrections.decision(results)}, corrections.criteria(results)


def _log(
    number: int, scale_name: str, scale: Scale, seed: int, recorded: Recorded | None, tell: Tell
) -> dict[str, Any]:  # fmt: skip
    """One experiment of one seed, in the protocol's template for logs."""
    results, bars = _measure(number, scale, seed, recorded, tell)
    return {
        "format": FORMAT, "experiment_id": f"exp_{number:03d}", "hypothesis": HYPOTHESIS[number], "seed": seed,
        "date": datetime.date.today().isoformat(),
        "config": {"scale": scale_name, "model_size": scale.preset, "dataset": scale.data or "default",
                   **asdict(scale)},
        "results": results, "criteria": [bar.to_json() for bar in bars],
        "conclusion": "; ".join(f"{bar.name}: {bar.verdict}" for bar in bars),
        "next_steps": NEXT[results["decision"]],
    }  # fmt: skip


def _stored(path: Path, number: int, scale: Scale) -> dict[str, Any]:
    """A result as it was written.

    Raises:
        ConfigError: it is damaged, or of another version or size.
    """
    found = read_json_object(path)
    if found.get("format") != FORMAT:
        raise ConfigError(f"{path}: is a result of another version; choose another --out")
    config = found.get("config")
    same = jsonable(asdict(scale))
    if not isinstance(config, dict) or any(config.get(k) != v for k, v in same.items()):
        raise ConfigError(f"{path}: is a result at other sizes; choose another --out")
    bars = found.get("criteria")
    whole = isinstance(bars, list) and all(isinstance(b, dict) and {"name", "value", "bar"} <= b.keys() for b in bars)
    if not whole or not isinstance(found.get("results"), dict) or "decision" not in found["results"]:
        raise ConfigError(f"{path}: is damaged; delete it to run this seed again")
    with read_from(path):  # whatever a verdict needs is there, or the file is named while it is known
        judged = {str(number): _judged(number, [found])}
        format_text({"scale": "", "seeds": 1, "experiments": judged, "hypotheses": hypotheses.verdicts(judged)})
    return found


def _judged(number: int, logs: list[dict[str, Any]]) -> dict[str, Any]:
    bars = over_seeds([log["criteria"] for log in logs])
    results = [log["results"] for log in logs]
    found: dict[str, Any] = {"name": NAMES[number], "criteria": bars, "results": results}
    found["decisions"] = [r["decision"] for r in results]
    found["cpu_seconds"] = sum(log.get("cpu_seconds") or 0.0 for log in logs)
    if number == 4:
        found["equivalence"] = hypotheses.equivalences(results)
    return found


def format_text(found: dict[str, Any]) -> str:
    """What a person reads."""
    lines = []
    for number, result in found["experiments"].items():
        lines.append(f"experiment {number}: {result['name']}, {found['scale']}, {len(result['results'])} seeds")
        for bar in result["criteria"]:
            ends = bar["interval"]
            interval = "" if ends is None else f" [{ends[0]:.3g}, {ends[1]:.3g}]"
            lines.append(
                f"  {bar['verdict']:<6}  {bar['name']}: {bar['value']:.3g}{interval}, bar {bar['sense']} "
                f"{bar['bar']:.3g}; {control_words(bar)}"
            )
        said = [r["verdict"] for r in result["results"] if "verdict" in r]
        lines += [f"  verdict: {', '.join(said)}"] if said else []
        lines.append(f"  stop rule: {', '.join(result['decisions'])}")
        lines += [f"  {line}" for line in hypotheses.equivalence_lines(result.get("equivalence", []))]
    lines += [f"{h['name']}: {h['verdict']}: {h['why']}" for h in found["hypotheses"]]
    return "\n".join(lines)


def control_words(bar: dict[str, Any]) -> str:
    """The control's figure, and the ceiling where it was measured."""
    ceiling = bar.get("ceiling")
    return f"{bar['control_name']}: {bar['control']:.3g}" + ("" if ceiling is None else f"; ceiling: {ceiling:.3g}")


def markdown(found: dict[str, Any]) -> str:
    """The tables of docs/validation.md."""
    lines = ["### Hypotheses", "", "| hypothesis | verdict | why |", "|---|---|---|"]
    lines += [f"| {h['name']}: {h['statement']} | **{h['verdict']}** | {h['why']} |" for h in found["hypotheses"]]
    lines.append("")
    for number, result in found["experiments"].items():
        lines += [f"### Experiment {number}: {result['name']}", ""]
        lines += ["| criterion | measured | 95 % interval | bar | control | verdict |", "|---|---|---|---|---|---|"]
        for bar in result["criteria"]:
            ends = "-" if bar["interval"] is None else f"{bar['interval'][0]:.3g} to {bar['interval'][1]:.3g}"
            lines.append(
                f"| {bar['name']} | {bar['value']:.3g} | {ends} | {bar['sense']} {bar['bar']:.3g} | "
                f"{control_words(bar)} | {bar['verdict']} |"
            )
        lines += ["", f"Stop rule, by seed: {', '.join(result['decisions'])}.", ""]
        told = hypotheses.equivalence_lines(result.get("equivalence", []))
        lines += [*(f"- {line}" for line in told), ""] if told else []
    return "\n".join(lines)

"""``hpt bench regimes --regime rl``: jumps in policy optimization beside their nulls and beside a tuned rate."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...safe_files import read_json_object, write_text
from ..arms.environment import environment
from ..arms.options import InputError
from ..regimes.cache import METHOD, fingerprint
from ..statistics import Interval, bounded_interval, ends_words, t_interval
from .linearity import shared_drift, straightness, with_random_signs
from .policy import judged_problems, new_policy, supervised
from .runs import RolloutArm, RolloutRun, run

#: Bump where the meaning of a stored run changes.
FORMAT = 1
#: Of a plain run with wsd (research on this task: rates from 1e-4 to 1.6e-3, three seeds).
TUNED_RATE = 8e-4
#: Expected reward of the supervised policy.
BEGIN_AT = 0.25
STEPS, STEPS_QUICK, SEEDS, SEEDS_QUICK = 300, 120, 5, 2
#: Judged seeds: those below have been looked at while the rule was chosen.
FIRST_SEED = 20
#: Lengths of the plain arm that S is read off.
LENGTHS = (2 / 3, 1.0, 4 / 3)

PLAIN = RolloutArm(name="plain")
ARMS = (
    RolloutArm(name="linear decay", schedule="linear"),
    RolloutArm(name="twice the rate", rate=2.0),
    RolloutArm(name="mean of 20, Y 10, judged", rule="mean", window=20, judged=True),
    RolloutArm(name="shrunken, 40, Y 10", rule="shrunken"),
    RolloutArm(name="shrunken, 40, Y 10, judged", rule="shrunken", judged=True),
    RolloutArm(name="null: random signs", rule="random-signs"),
    RolloutArm(name="null: another seed's window", rule="other-seed"),
    RolloutArm(name="trainer (defaults)", rule="trainer"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """What was asked for; None where nothing was said.

    Attributes:
        out: Folder of runs.
        quick: Fewer and shorter runs.
        seeds: Judged runs per arm.
        first_seed: Of them.
        steps: Real steps of a plain run.
        fresh: Take no stored run.
        arms: Names, beside plain; empty: all.
    """

    out: Path
    quick: bool = False
    seeds: int | None = None
    first_seed: int | None = None
    steps: int | None = None
    fresh: bool = False
    arms: tuple[str, ...] = ()


class _Bench:
    """Runs of one request, each stored as it ends."""

    def __init__(self, request: RolloutRequest, note: Callable[[str], None]) -> None:
        self.steps = request.steps or (STEPS_QUICK if request.quick else STEPS)
        if self.steps < 50:
            raise InputError(f"--steps {self.steps}: the shortest run that a window of 40 steps fits into has 50")
        first = FIRST_SEED if request.first_seed is None else request.first_seed
        num = request.seeds or (SEEDS_QUICK if request.quick else SEEDS)
        if num < 2:
            raise InputError("--seeds 1: what seeds share is told from two or more")
        self.seeds = tuple(range(first, first + num))
        self.arms = _chosen(request.arms)
        self.folder, self.fresh, self.note = request.out / "rl", request.fresh, note
        self.scored = judged_problems()
        self.num_done, self.num_runs = 0, num * (len(LENGTHS) + len(self.arms))

    def base(self) -> nn.Module:
        """The supervised policy, trained once."""
        policy = new_policy(100)
        path = self.folder / f"base-{FORMAT}.safetensors"
        if path.exists() and not self.fresh:
            policy.load_state_dict(load_file(path))
            return policy
        self.note(f"supervised training to an expected reward of {BEGIN_AT}")
        steps = supervised(policy, BEGIN_AT)
        self.note(f"reached after {steps} steps")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(policy.state_dict()), path)
        return policy

    def result(
        self, base: nn.Module, arm: RolloutArm, seed: int, others: Mapping[int, Tensor] | None = None
    ) -> dict[str, Any]:
        """Figures of a run: stored ones, or of a run that is made now."""
        depends_on = [f"{folder}*.py" for folder in METHOD] if arm.rule == "trainer" else []
        identity = {
            "format": FORMAT, "arm": asdict(arm), "steps": self.steps, "seed": seed, "rate": TUNED_RATE,
            "code": fingerprint("experiments/rollouts/runs.py", "experiments/rollouts/policy.py", *depends_on),
        }  # fmt: skip
        name = f"{arm.name}-x{arm.length:.2f}-{self.steps}-{seed}".replace(" ", "_").replace(":", "").replace("'", "")
        path, windows = self.folder / f"{name}.json", self.folder / f"{name}.safetensors"
        follows = arm == PLAIN
        self.num_done += 1
        if path.exists() and not self.fresh and (windows.exists() or not follows):
            stored = read_json_object(path)
            if stored.get("identity") == identity:
                return stored
        found = run(
            copy.deepcopy(base), arm, rate=TUNED_RATE, steps=self.steps, seed=seed, scored=self.scored,
            others=dict(others or {}), keep_path=follows,
        )  # fmt: skip
        stored = {"identity": identity, **_figures(found, seed)}
        if follows:
            save_file({str(step): w for step, w in found.windows.items()}, windows)
        write_text(path, json.dumps(stored, indent=1) + "\n")
        self.note(f"{self.num_done}/{self.num_runs} {name}: reward {found.reward:.3f}, {found.cpu_s:.0f} s of CPU time")
        return stored

    def windows(self, seed: int) -> dict[int, Tensor]:
        """Displacements of a plain run's windows by the step that they end with."""
        stored = load_file(self.folder / f"plain-x1.00-{self.steps}-{seed}.safetensors")
        return {int(step): w for step, w in stored.items()}


def _chosen(names: Sequence[str]) -> tuple[RolloutArm, ...]:
    known = {arm.name.replace(" ", "-"): arm for arm in ARMS}
    wrong = [name for name in names if name not in known and name != "plain"]
    if wrong:
        raise InputError(f"unknown arm of regime rl: {wrong[0]!r}; known: {', '.join(known)}")
    return tuple(arm for name, arm in known.items() if not names or name in names)


def _figures(found: RolloutRun, seed: int) -> dict[str, Any]:
    figures = {
        name: getattr(found, name) for name in ("reward", "greedy", "steps", "tokens", "cpu_s", "proposed", "kept")
    }
    if found.path is not None:
        null = with_random_signs(found.path, torch.Generator().manual_seed(seed))
        figures["straightness"] = {"run": straightness(found.path), "random signs": straightness(null)}
    return figures


def measure(request: RolloutRequest, note: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not stored and compare.

    Raises:
        InputError: a setting does not fit.
    """
    torch.set_num_threads(1)
    bench = _Bench(request, note)
    base = bench.base()
    plain = {
        length: [bench.result(base, RolloutArm(name="plain", length=length), seed) for seed in bench.seeds]
        for length in sorted(LENGTHS, key=lambda length: length != 1.0)
    }
    windows = [bench.windows(seed) for seed in bench.seeds]
    rows = []
    for arm in bench.arms:
        others = [*windows[1:], windows[0]]
        runs = [bench.result(base, arm, seed, w) for seed, w in zip(bench.seeds, others, strict=True)]
        rows.append(_row(arm.name, runs, plain, bench.steps))
    return {
        "regime": "rl", "steps": bench.steps, "seeds": list(bench.seeds), "rate": TUNED_RATE,
        "plain": {f"{length:.2f}": _means(runs) for length, runs in plain.items()}, "rows": rows,
        "straightness": _mean_straightness(plain[1.0]), "shared_drift": shared_drift(windows),
        "environment": environment("cpu"),
    }  # fmt: skip


def _means(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: statistics.fmean(r[name] for r in runs) for name in ("reward", "greedy", "tokens", "cpu_s")}


def _mean_straightness(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {
        of: {key: statistics.fmean(r["straightness"][of][key] for r in runs) for key in runs[0]["straightness"][of]}
        for of in ("run", "random signs")
    }


def _row(
    name: str, runs: Sequence[Mapping[str, Any]], plain: Mapping[float, Sequence[Mapping[str, Any]]], steps: int
) -> dict[str, Any]:
    base = plain[1.0]
    difference = t_interval([r["reward"] - p["reward"] for r, p in zip(runs, base, strict=True)])
    speed = [speedup(r["reward"], {length: plain[length][i]["reward"] for length in plain}) for i, r in enumerate(runs)]
    values = [s * steps / r["steps"] for (s, _), r in zip(speed, runs, strict=True)]
    by_tokens = [s * steps / r["tokens"] for (s, _), r in zip(speed, runs, strict=True)]
    bounds = [bound for _, bound in speed]
    return {
        "name": name, **_means(runs), "difference": asdict(difference), "proposed": sum(r["proposed"] for r in runs),
        "kept": sum(r["kept"] for r in runs), "speedup": asdict(bounded_interval(values, bounds)),
        "speedup_tokens": asdict(bounded_interval(by_tokens, bounds)), "at_bound": sum(b != "exact" for b in bounds),
    }  # fmt: skip


def speedup(reward: float, plain: Mapping[float, float]) -> tuple[float, Any]:
    """Length of the plain run that ends at a reward, over the case's, and whether it is only a bound.

    Args:
        reward: Of the run that is compared.
        plain: Rewards of plain runs of the same seed by their length.

    Returns:
        By straight lines between the lengths; "at most" the shortest, "at least" the longest.
    """
    lengths = sorted(plain)
    best = [max(plain[length] for length in lengths[: i + 1]) for i in range(len(lengths))]  # rises with length
    if reward <= best[0]:
        return lengths[0], "exact" if reward == best[0] else "at most"
    for (a, low), (b, high) in itertools.pairwise(zip(lengths, best, strict=True)):
        if reward <= high:
            return a + (b - a) * (reward - low) / (high - low), "exact"
    return lengths[-1], "at least"


# ---- text ---------------------------------------------------------------------------------------------------


def format_text(result: Mapping[str, Any]) -> str:
    """The tables, in Markdown, and what they say of jumps."""
    plain = result["plain"]
    lines = [
        f"rl: three-digit addition by policy gradient, {result['steps']} rollouts of 128 answers, "
        f"rate {result['rate']:g}, wsd, seeds {result['seeds'][0]} to {result['seeds'][-1]}", "",
        "| arm | reward | greedy | reward less plain's | S by rollouts | S by tokens | jumps kept | CPU s |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| plain, {float(length):.2f} of the length | {row['reward']:.3f} | {row['greedy']:.3f} | "
            f"{'-' if length == '1.00' else format(row['reward'] - plain['1.00']['reward'], '+.3f')} | "
            f"{float(length):.2f} | - | - | {row['cpu_s']:.0f} |"
            for length, row in sorted(plain.items())
        ),
        *(_line(row) for row in result["rows"]), "",
        "| trajectory | " + " | ".join(result["straightness"]["run"]) + " |",
        "|---" * (1 + len(result["straightness"]["run"])) + "|",
        *(
            f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |"
            for name, row in result["straightness"].items()
        ), "",
        "share of a window of 40 steps that seeds have in common, by its last step: "
        + ", ".join(f"{step}: {share:.2f}" for step, share in result["shared_drift"].items()),
        "", ruling(result),
    ]  # fmt: skip
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    jumps = f"{row['kept']}/{row['proposed']}" if row["proposed"] else "-"
    return (
        f"| {row['name']} | {row['reward']:.3f} | {row['greedy']:.3f} | {_interval(row['difference'], '+.3f')} | "
        f"{_interval(row['speedup'], '.2f')} | {_interval(row['speedup_tokens'], '.2f')} | {jumps} | "
        f"{row['cpu_s']:.0f} |"
    )


def _interval(found: Mapping[str, Any], form: str) -> str:
    interval = Interval(**{**found, "bootstrap_t": None})
    mean = "-" if math.isnan(interval.mean) else format(interval.mean, form)
    return mean if interval.ends is None else f"{mean} {ends_words(interval.ends, form)}"


def ruling(result: Mapping[str, Any]) -> str:
    """Whether a rule of jumps is better than plain training at its tuned rate beyond the seeds' scatter."""
    jumps = [row for row in result["rows"] if row["proposed"] and not row["name"].startswith("null")]
    gains = [row["name"] for row in jumps if (row["difference"]["low"] or -1.0) > 0]
    nulls = [r["name"] for r in result["rows"] if r["name"].startswith("null") and (r["difference"]["low"] or -1.0) > 0]
    if len(result["seeds"]) < SEEDS:
        return f"no ruling: {len(result['seeds'])} seeds, {SEEDS} are wanted"
    if gains:
        beside = f"; so do {', '.join(nulls)}, so it is not the direction" if nulls else ""
        return f"jumps: {', '.join(gains)} end above plain training at its tuned rate{beside}"
    return "jumps: no-go. None ends above plain training at its tuned rate beyond the scatter of the seeds"

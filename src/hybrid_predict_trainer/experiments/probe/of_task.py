"""Probes of the library's own tasks, and whether they say what long comparisons have measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...tasks.recipes import lr_factor
from ..arms.drive import recipe_optimizer, seeded_model
from ..arms.options import Options as TaskOptions
from ..arms.options import build_experiment
from .run import MINUTES, REPLICATES, Options, Report, probe

#: How many of the five regimes have to agree.
MIN_AGREED = 4
QUICK_STEPS = 300
#: Of weights and data: another one than the measured runs'.
SEED = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A regime whose S was measured (docs/benchmarks.md, table of all rows).

    Attributes:
        name: of the regime.
        options: of its task.
        speedup: S by cost.
        at_least: S is a lower bound: no plain run was as good.
        command: that measured it.
    """

    name: str
    options: TaskOptions
    speedup: float
    at_least: bool
    command: str


KNOWN = (
    Known(name="pinn", options=TaskOptions(task="pinn-poisson", steps=2000, lr=0.02), speedup=16.0, at_least=True,
          command="pinn --case pinn-poisson"),
    Known(name="epochs", options=TaskOptions(task="digits-mlp", lr=0.02, steps=288), speedup=1.25, at_least=True,
          command="epochs --case digits-mlp"),
    Known(name="finetune", options=TaskOptions(task="finetune", preset="stdlib", steps=100, lr=0.004), speedup=1.25,
          at_least=False, command="finetune --case stdlib"),
    Known(name="lm-lowlr", options=TaskOptions(task="gpt", preset="0.3M", schedule="wsd", steps=200, lr=2.1e-4),
          speedup=3.4, at_least=False, command="lm-lowlr --case embedded-wsd-x0.1"),
    Known(name="lm", options=TaskOptions(task="gpt", preset="0.3M", schedule="wsd", steps=300, lr=2.1e-3),
          speedup=1.31, at_least=False, command="lm --case embedded-wsd"),
)  # fmt: skip


def probe_task(
    options: TaskOptions, *, minutes: float = MINUTES, seed: int = 0, pilot_steps: int | None = None,
    replicates: int = REPLICATES, tell: Callable[[str], None] = lambda _: None,
) -> Report:  # fmt: skip
    """Probe a task with its own recipe.

    Args:
        options: Of the command line.
        minutes: Wall-clock.
        seed: Of the weights.
        pilot_steps: Length of the pilots; None: as the time allows.
        replicates: Orders of the data.
        tell: Takes a line about every pilot.

    Raises:
        InputError: the task cannot be made.
        ConfigError: there is time for too few steps.
    """
    setup = build_experiment(options)
    task, recipe = setup.task, setup.recipe
    model = seeded_model(setup, seed)
    warmup = min(recipe.warmup_steps, recipe.steps // 10) / recipe.steps
    fine = 100_000

    def schedule(share: float) -> float:
        return lr_factor(
            round(share * fine), schedule=recipe.schedule, total_steps=fine, warmup_steps=round(warmup * fine),
            decay_frac=recipe.decay_frac,
        )  # fmt: skip

    return probe(
        model, recipe_optimizer(model, recipe, setup.settings), lambda s: task.batches(1000 * seed + s), task.loss_fn,
        total_steps=recipe.steps, minutes=minutes,
        options=Options(
            schedule=schedule, grad_clip=recipe.grad_clip or 0.0, val_fn=task.evaluate, pilot_steps=pilot_steps,
            steps_per_epoch=task.steps_per_epoch, replicates=replicates,
            rates=replicates > 1, tell=tell,
        ),
    )  # fmt: skip


def check(minutes: float, names: tuple[str, ...], quick: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Probe the five regimes and hold the expected gains against those that were measured.

    Args:
        minutes: Of each probe.
        names: Of regimes; empty: all.
        quick: Pilots of at most :data:`QUICK_STEPS`, of one order of the data.
        tell: Takes a line about every pilot.

    Returns:
        JSON-able rows; ``passed`` where at least four of five agree.
    """
    rows = []
    for known in KNOWN:
        if names and known.name not in names:
            continue
        steps = min(known.options.steps or QUICK_STEPS, QUICK_STEPS) if quick else None
        report = probe_task(
            known.options, minutes=minutes, seed=SEED, pilot_steps=steps, replicates=1 if quick else REPLICATES,
            tell=lambda line, name=known.name: tell(f"{name}: {line}"),  # type: ignore[misc]
        )  # fmt: skip
        rows.append({**_row(known, report), "report": report.to_json()})
    needed = min(MIN_AGREED, len(rows))
    return {"rows": rows, "agreed": sum(r["agrees"] for r in rows), "passed": sum(r["agrees"] for r in rows) >= needed}


def _row(known: Known, report: Report) -> dict[str, Any]:
    total = report.total
    agrees = total.contains(known.speedup)
    if known.at_least and not agrees:  # the measured figure is a bound: all above it agrees as well
        agrees = (total.high is None and math.isfinite(total.speedup)) or total.low >= known.speedup
    return {
        "regime": known.name, "measured": known.speedup, "at_least": known.at_least, "expected": total.speedup,
        "low": total.low, "high": total.high, "agrees": agrees, "seen_as": report.regime, "total": total.verdict,
        "jumps": report.jumps.verdict, "sizes": report.sizes.verdict, "learning_rate": report.learning_rate,
        "seconds": report.seconds, "steps": report.steps, "command": known.command,
    }  # fmt: skip


HEAD = ("regime", "measured S", "expected S", "90 % interval", "agrees", "seen as", "jumps", "step sizes", "rate", "s")


def format_table(found: dict[str, Any]) -> list[list[str]]:
    """Rows for a person."""
    rows = []
    for r in found["rows"]:
        high = "and more" if r["high"] is None else f"to {r['high']:.2f}"
        rows.append([
            r["regime"], f"{'at least ' if r['at_least'] else ''}{r['measured']:g}",
            f"{'at least ' if r['high'] is None else ''}{r['expected']:.2f}", f"{r['low']:.2f} {high}",
            "yes" if r["agrees"] else "**no**", r["seen_as"], r["jumps"], r["sizes"], r["learning_rate"],
            f"{r['seconds']:.0f}",
        ])  # fmt: skip
    return rows


def markdown(found: dict[str, Any]) -> str:
    """The table of docs/probe.md."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in format_table(found))]) + "\n"


def format_text(found: dict[str, Any]) -> str:
    """What a person reads."""
    from ..report.text import aligned

    verdict = f"{'PASS' if found['passed'] else 'FAIL'}  {found['agreed']} of {len(found['rows'])} agree"
    return "\n".join([*aligned(HEAD, format_table(found)), verdict])

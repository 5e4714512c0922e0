"""Today's GPT at equal wall-clock: the plain recipe with one rate, the plain recipe with four, and ours.

For an accelerator (``benchmarks/gpu.sh``, part g).  A short run of every arm says how long a step of it takes; then
every arm gets as many steps as fit, with a whole schedule of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..arms.environment import environment
from ..arms.options import Options, build_experiment
from ..run_arm import Arm, ArmRun, Experiment, Kind, run_arm

ARMS: dict[str, Kind] = {"plain": "plain", "four-rates": "peer", "hybrid": "hybrid"}
#: Steps of the short run, twice: what is compiled or allocated in the first is not timed.
PILOT_STEPS = 20
SCHEMA = 1


def measure(
    options: Options, *, seconds: float, seed: int = 0, lrs: Mapping[str, float] | None = None,
    pilot_steps: int = PILOT_STEPS, note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Run the arms one after the other.

    Args:
        options: Task, size, device and data.
        seconds: Wall-clock of one arm's run, validation left out.
        seed: Of model and data.
        lrs: Arm -> peak rate; the task's own where none is given.
        pilot_steps: Of the short runs.
        note: Takes lines for a person who waits.

    Raises:
        InputError: the options do not fit.
    """
    setup = build_experiment(options)
    rows = []
    for name, kind in ARMS.items():
        lr = (lrs or {}).get(name, setup.recipe.lr)
        per_step = pilot(setup, Arm(name=name, kind=kind, lr=lr), seed, pilot_steps)
        steps = max(round(seconds / per_step), 1)
        note(f"{name}: {1e3 * per_step:.1f} ms a step, {steps} steps at {lr:g}")
        run = run_arm(replace(setup, steps=steps), Arm(name=name, kind=kind, lr=lr), seed)
        rows.append(row(run))
        note(f"{name}: validation loss {run.final_val_loss:.4f} after {run.wall_s:.1f} s")
    return {
        "schema": SCHEMA, "what": "equal-time", "seconds": seconds, "seed": seed, "arms": rows,
        "task": setup.task.describe(), "options": asdict(options), "environment": environment(options.device or "cpu"),
    }  # fmt: skip


def pilot(setup: Experiment, arm: Arm, seed: int, steps: int) -> float:
    """Seconds that a step of an arm takes."""
    short = replace(setup, steps=steps)
    run_arm(short, arm, seed)
    return run_arm(short, arm, seed).wall_s / steps


def row(run: ArmRun) -> dict[str, Any]:
    """What is told of an arm."""
    return {
        "arm": run.arm.name, "lr": run.arm.lr, "steps": run.steps, "real_steps": run.counts["num_real_steps"],
        "wall_s": run.wall_s, "final_val_loss": run.final_val_loss, "error": run.error,
        "curve": [list(point) for point in run.curve],
    }  # fmt: skip


def format_text(result: Mapping[str, Any]) -> str:
    """A line per arm."""
    arms: Sequence[Mapping[str, Any]] = result["arms"]
    lines = [
        f"{a['arm']:12s} {a['real_steps']:.0f} steps in {a['wall_s']:.1f} s at {a['lr']:g}: {a['final_val_loss']:.4f}"
        for a in arms
    ]
    return "\n".join([f"equal wall-clock, {result['seconds']:g} s an arm, seed {result['seed']}", *lines])

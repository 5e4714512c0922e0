"""Experiment 4: runs in which 25, 50 and 80 % of the steps are predicted.

A predicted step counts as a step of the schedule (clock "claimed"), and every prediction is made, whatever it does.
Each run stands beside two controls that predict nothing: the same jumps going nowhere, and a plain run of as many
backward passes with a schedule of its own.  A claim "within 2 %" that these meet as well is a claim about stopping
early.  Beside them the trainer itself runs with the same clock: it takes only jumps that a measurement approves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..arms.options import Options, build_experiment
from ..downstream import minimal_pairs
from ..run_arm import Arm, run_arm
from .criteria import Criterion
from .forced import ForcedRun, Outcome, forced, plain, zero_of
from .loop import Loop, task_of
from .plain import Scale

#: Largest relative gap of the final loss by predicted share in percent; the seeds name none for 80 %.
BARS = {25: 0.01, 50: 0.02, 80: 0.02}
JUMPS_ONLY = (
    "training.clock=claimed", "training.max_lr_multiplier=1.0", "training.min_group_factor=1.0",
    "lookahead.extrapolation=0.0", "lookahead.damping=0.0", "training.recipe=off",
)  # fmt: skip
#: The smallest share that the seeds ask for.
GATED_BAR = 0.25
PERPLEXITY_BAR, DOWNSTREAM_BAR, TIME_BAR, STEPS_BAR = 1.05, 0.01, 0.5, 0.5


def measure(scale: Scale, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """All runs of one seed: by share (in percent) what each of its arms came to, and the baseline."""
    task = task_of(scale)
    runs: dict[str, Any] = {}

    def note(name: str, found: tuple[Loop, Outcome]) -> None:
        loop, outcome = found
        outcome.task_metrics = _downstream(loop) if name == "baseline" or name.startswith("50 %") else {}
        runs[name] = outcome.to_json()
        tell(f"seed {seed}: {name}: loss {outcome.loss:.4f}, {outcome.real} real steps, {outcome.claimed} predicted")

    note("baseline", plain(scale, seed, task))
    for percent, horizon in scale.jump_steps:
        plan = ForcedRun(share=percent / 100, horizon=horizon, predictor=scale.forced)
        note(f"{percent} % predicted", forced(scale, seed, task, plan))
        note(f"{percent} % jump of zero", forced(scale, seed, task, zero_of(plan)))
        note(f"{percent} % equal backward", plain(scale, seed, task, runs[f"{percent} % predicted"]["real_steps"]))
    runs["judged"] = _judged(scale, seed)
    tell(f"seed {seed}: judged by the gate: loss {runs['judged']['loss']:.4f}, "
         f"{runs['judged']['claimed_steps']:.0f} predicted")  # fmt: skip
    return {"runs": runs}


def _judged(scale: Scale, seed: int) -> dict[str, Any]:
    """The trainer with clock "claimed" and nothing but jumps: no multiplier, group warm-up or lookahead."""
    setup = build_experiment(Options(
        task=scale.task, preset=scale.preset, batch_size=scale.batch_size, context=scale.context, data=scale.data,
        steps=scale.steps, threads=torch.get_num_threads(), predictor=scale.forced, set=JUMPS_ONLY,
    ))  # fmt: skip
    began = time.process_time()
    run = run_arm(setup, Arm(name="judged", kind="hybrid", lr=setup.recipe.lr), seed)
    counts = {k: int(run.counts[f"num_{k}_steps"]) for k in ("real", "claimed")}
    outcome = Outcome(run.final_val_loss, counts["real"], counts["claimed"], time.process_time() - began,
                      int(run.counts["num_jumps_accepted"]))  # fmt: skip
    return outcome.to_json()


def _downstream(loop: Loop) -> dict[str, float]:
    pairs = minimal_pairs.load()
    reads_bytes = getattr(loop.task, "context", None) is not None or hasattr(loop.task, "_windows")
    if not pairs or not reads_bytes:
        return {}
    context = int(loop.task.describe()["context"])
    return {"minimal_pairs": minimal_pairs.accuracy(loop.model, pairs, context)}


def gap(run: Mapping[str, Any], baseline: Mapping[str, Any]) -> float:
    """Relative distance of the final loss above the baseline's; infinite for a run that diverged."""
    loss = run["loss"]
    if loss is None or not math.isfinite(loss):
        return math.inf
    return float(loss / baseline["loss"] - 1)


def criteria(found: Mapping[str, Any]) -> list[Criterion]:
    """The bars of every share, and whether the predicted steps are worth anything."""
    runs = found["runs"]
    baseline, bars = runs["baseline"], []
    for percent, bar in BARS.items():
        name = f"{percent} %"
        if f"{name} predicted" not in runs:
            continue
        ours, zero, equal = (runs[f"{name} {arm}"] for arm in ("predicted", "jump of zero", "equal backward"))
        bars += [
            Criterion(name=f"{name} predicted: final loss above the baseline's", value=gap(ours, baseline), bar=bar,
                      sense="below", control=gap(zero, baseline), control_name="jump of zero"),
            Criterion(name=f"{name} predicted: final loss over that of as many backward passes", sense="below", bar=1.0,
                      value=1 + gap(ours, equal), control=1 + gap(zero, equal), control_name="jump of zero"),
            Criterion(name=f"{name} predicted: perplexity over the baseline's", sense="below", bar=PERPLEXITY_BAR,
                      value=ours["perplexity"] / baseline["perplexity"],
                      control=equal["perplexity"] / baseline["perplexity"], control_name="as many backward passes"),
        ]  # fmt: skip
        if percent == 50:
            bars.append(Criterion(
                name=f"{name} predicted: processor time over the baseline's", sense="below", bar=TIME_BAR,
                value=ours["cpu_seconds"] / baseline["cpu_seconds"],
                control=equal["cpu_seconds"] / baseline["cpu_seconds"], control_name="as many backward passes",
            ))  # fmt: skip
        if "minimal_pairs" in ours and percent == 50:
            bars.append(Criterion(
                name=f"{name} predicted: difference in minimal pairs", sense="below", bar=DOWNSTREAM_BAR,
                value=abs(ours["minimal_pairs"] - baseline["minimal_pairs"]),
                control=abs(zero["minimal_pairs"] - baseline["minimal_pairs"]), control_name="jump of zero",
            ))  # fmt: skip
    judged = runs["judged"]
    within = gap(judged, baseline) < BARS[50]
    bars.append(Criterion(
        name="share of steps predicted by jumps that the gate approves, final loss within 2 %", sense="above",
        value=judged["predicted_share"] if within else 0.0, bar=GATED_BAR, control=0.0, control_name="no jumps",
    ))  # fmt: skip
    return bars


def decision(found: Mapping[str, Any]) -> str:
    """Scale up within 2 % at half of the steps, where jumps of zero are not; refine where these are beaten; stop."""
    runs = found["runs"]
    ours, zero = (gap(runs[f"50 % {arm}"], runs["baseline"]) for arm in ("predicted", "jump of zero"))
    return "continue" if ours < BARS[50] <= zero else "refine" if ours < zero else "stop"

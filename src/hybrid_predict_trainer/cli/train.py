"""``hpt train``: one run."""

from __future__ import annotations

import argparse
from typing import Any

from ..experiments import train as single
from ..experiments.run_arm import in_steps
from ..tell.account import motions
from ..tell.phase_log import PhaseLog
from .arguments import folder_of, options_of, show
from .progress import Progress


def run(args: argparse.Namespace) -> int:
    """Train once, or go on with a run that was stopped.

    Raises:
        InputError: the request cannot be met, or is not that of the run to be resumed.
        CheckpointError: there is nothing intact to resume from, or the last checkpoint cannot be written.
        DivergenceError: the run has diverged.
    """
    request = single.Request(options=options_of(args), seed=args.seed, plain=args.plain, record=args.record)
    bars: list[Progress | PhaseLog] = []

    def watch(label: str, trainer: Any, total: int) -> Progress | PhaseLog:
        bars.append(PhaseLog(trainer) if args.log == "phases" else Progress(trainer, total, name=label))
        return bars[-1]

    result, status = single.train(request, folder_of(args), resume=args.resume, watch=watch)
    for bar in bars:
        bar.close()
    show(args, result, lambda: trained(result))
    return status


RETRIED = (
    "the guard brought the run's best state back and halved the learning rate: the optimizer's steps had led off it; "
    "a lower --lr may do better"
)


def trained(result: dict[str, Any]) -> str:
    """What a person wants to know of a run."""
    counts, loss = result["statistics"], result["final_val_loss"]
    error = f", relative L2 error {result['solution_error']:.2e}" if "solution_error" in result else ""
    back = counts["num_guard_restores"]
    withdrawn = "the guard withdrew prediction, multiplier and lookahead: the loss stood above its best for good"
    head = (
        f"validation loss {loss:.5g}{error}" if loss is not None else "stopped before the end; add --resume to continue"
    )
    return "\n".join([
        f"{result['task']}, {result['arm']}, seed {result['seed']}: {head}",
        f"cost {in_steps(counts['cost_units']):.1f} of {result['steps']} steps, {result['wall_s']:.1f} s, "
        f"jumps accepted {counts['num_jumps_accepted']} of {counts['num_jumps_proposed']}",
        *([motions(counts)] if result["arm"] == "hybrid" else []),
        *([withdrawn + (", and its best state came back" if back else "")] if counts["withdrawn"] else []),
        *([RETRIED] if back and not counts["withdrawn"] else []),
        f"results in {result['out']}",
    ])  # fmt: skip

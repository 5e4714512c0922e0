"""Classification: CPU time until the validation loss that tuned AdamW ends at, full batch and minibatches.

    python -m hybrid_predict_trainer.experiments.bench.classes --tasks digits-mlp,digits --batches full,256 --seeds 3

AdamW gets a constant rate, the best of a grid over two seeds that are not judged, and so many steps; its best
validation loss on the way is the mark.  The trainer has the same weights, the same batches and AdamW at the same rate;
it may take three times as long.  Validation is not timed.  One thread, CPU time of this process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...tasks import TaskSettings, make_task
from ...trainer import HybridTrainer

#: Rates tried, seeds that choose among them, and how often a run is validated.
RATES, SWEEP_SEEDS, LOOKS = (1e-3, 3e-3, 1e-2, 3e-2), (100, 101), 60
#: Multiple of AdamW's time after which a run has lost.
PATIENCE = 3.0
#: Settings of the arms; None: the plain loop.
ARMS: dict[str, dict[str, Any] | None] = {
    "adamw": None, "default": {}, "default + output_fn": {}, "gauss_newton": {"predictor.type": "gauss_newton"},
}  # fmt: skip


@dataclass
class Curve:
    """Validation losses over CPU time of training.

    Attributes:
        seconds, losses: At every look.
        steps: Real steps so far.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    steps: int = 0

    def time_to(self, mark: float) -> float:
        """Seconds at the first look at or below the mark; infinite where there is none."""
        return next((s for s, loss in zip(self.seconds, self.losses, strict=True) if loss <= mark), math.inf)


class Timer:
    """CPU time without that of validation."""

    def __init__(self, task: Any, model: torch.nn.Module, every: int) -> None:
        """It starts.

        Args:
            task: Validates.
            model: That is trained.
            every: Steps between looks.
        """
        self._task, self._model, self._every = task, model, every
        self.curve, self._spent, self._began = Curve(), 0.0, time.process_time()

    def step(self) -> None:
        """One more; now and then a look."""
        self.curve.steps += 1
        if self.curve.steps % self._every:
            return
        self._spent += time.process_time() - self._began
        self.curve.seconds.append(self._spent)
        self.curve.losses.append(self._task.evaluate(self._model))
        self._began = time.process_time()


def batches_of(task: Any, seed: int, *, full: bool) -> Iterator[Any]:
    """The same batch for ever, or the task's own."""
    stream: Iterator[Any] = iter(task.batches(seed))
    return itertools.repeat(next(stream)) if full else stream


def train(task: Any, arm: str, seed: int, rate: float, steps: int, *, full: bool, mark: float = -1.0,
          limit: float = math.inf) -> Curve:  # fmt: skip
    """One run.

    Args:
        task: A classifier.
        arm: Of :data:`ARMS`.
        seed: Of weights and batches.
        rate: AdamW's.
        steps: Of the plain loop.
        full: Always the same batch.
        mark: Ends a run of ours that reaches it.
        limit: Seconds after which it ends in any case.
    """
    model, values = task.build_model(seed), ARMS[arm]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    timer = Timer(task, model, max(steps // LOOKS, 1) if values is None else 1 if full else max(steps // LOOKS, 1))
    batches = batches_of(task, seed, full=full)
    if values is None:
        for batch in itertools.islice(batches, steps):
            optimizer.zero_grad()
            task.loss_fn(model, batch).backward()
            optimizer.step()
            timer.step()
        return timer.curve
    output_fn = None if arm == "default" else task.output_fn
    trainer = HybridTrainer(
        model, optimizer, with_values(HybridTrainerConfig(), values), loss_fn=task.loss_fn, output_fn=output_fn
    )
    curve = timer.curve
    trainer.fit(
        batches, total_steps=int(PATIENCE * steps), progress_callback=lambda _: timer.step(),
        should_stop=lambda: bool(curve.losses) and (curve.losses[-1] <= mark or curve.seconds[-1] > limit),
    )  # fmt: skip
    return curve


def compare(task: Any, seeds: Sequence[int], steps: int, *, full: bool) -> dict[str, Any]:
    """All arms; times over AdamW's, by seed."""

    def best(rate: float, seed: int) -> float:
        return min(train(task, "adamw", seed, rate, steps, full=full).losses)

    rate = min(RATES, key=lambda r: sum(best(r, s) for s in SWEEP_SEEDS))
    ratios: dict[str, list[float]] = {arm: [] for arm in ARMS if ARMS[arm] is not None}
    marks = []
    for seed in seeds:
        plain = train(task, "adamw", seed, rate, steps, full=full)
        marks.append(min(plain.losses))
        took = plain.time_to(marks[-1])
        for arm, found in ratios.items():
            curve = train(task, arm, seed, rate, steps, full=full, mark=marks[-1], limit=PATIENCE * took)
            found.append(curve.time_to(marks[-1]) / took)
    return {"rate": rate, "validation": marks, "time_over_adamw": ratios}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; rows as JSON lines with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="digits-mlp,digits")
    parser.add_argument("--batches", default="full,256")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name, size in itertools.product(args.tasks.split(","), args.batches.split(",")):
        full = size == "full"
        whole = make_task(name, TaskSettings(batch_size=1)).steps_per_epoch
        task: Any = make_task(name, TaskSettings(batch_size=whole if full else int(size)))
        row = {
            "task": name,
            "batch": size,
            "steps": args.steps,
            **compare(task, range(args.seeds), args.steps, full=full),
        }
        if args.out:
            with Path(args.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{name}, batch {size}: AdamW at {row['rate']:g}, validation {statistics.mean(row['validation']):.4f}")
        for arm, ratios in row["time_over_adamw"].items():
            told = ", ".join("never" if math.isinf(r) else f"{r:.2f}" for r in ratios)
            print(f"  {arm:20s} time over AdamW's: {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Final losses of full-batch runs at equal cost, as counted: what a setting or a rule of the sources is worth.

``python benchmarks/full_batch.py --steps 500 --seeds 10,11,12``: eight tasks with Adam at the task's rate and linear
decay, their losses, and the mean of log10 over all runs.  ``--set KEY=VALUE`` changes settings, ``--constant
NAME=VALUE`` a constant of ``propose/sources/arms.py``, ``--preset 50k`` the size, ``--rate`` the rate.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from typing import Any

import torch

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.experiments.arms.options import assignments
from hybrid_predict_trainer.propose.sources import arms
from hybrid_predict_trainer.tasks import TaskSettings, make_task

#: Task, and after a slash its type where it is not float32.
TASKS = (
    "pinn-poisson/float64", "pinn-poisson", "oscillator", "regression", "pinn-burgers", "pinn-klein-gordon/float64",
    "pinn-allen-cahn/float64", "pinn-inverse/float64",
)  # fmt: skip


def final_loss(task: Any, config: HybridTrainerConfig, seed: int, steps: int, rate: float) -> float:
    """Of one run on its first batch."""
    model, batch = task.build_model(seed), next(iter(task.batches(seed)))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1e-6, 1 - step / steps))
    trainer = HybridTrainer(
        model, optimizer, config, loss_fn=task.loss_fn, lr_scheduler=schedule,
        residual_fn=task.residual_fn if config.predictor_type in ("portfolio", "gauss_newton") else None,
    )  # fmt: skip
    trainer.fit(itertools.repeat(batch), total_steps=steps)
    return float(task.loss_fn(model, batch).detach())


def main() -> None:
    """Print a line per task, and the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--predictor", default="portfolio")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", default="10,11,12")
    parser.add_argument("--rate", type=float, help="the task's own where none is said")
    parser.add_argument("--preset", help="10k, 50k, 200k: weights")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--constant", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, _, text in (item.partition("=") for item in args.constant):
        if not hasattr(arms, name):
            parser.error(f"propose/sources/arms.py has no constant {name}")
        setattr(arms, name, float(text))
    config = with_values(HybridTrainerConfig(), {"predictor.type": args.predictor, **assignments(args.set)})
    logs: list[float] = []
    for item in args.tasks.split(","):
        name, _, dtype = item.partition("/")
        task: Any = make_task(name, TaskSettings(dtype=dtype or None, preset=args.preset))
        rate = args.rate or task.defaults.lr
        losses = [final_loss(task, config, int(seed), args.steps, rate) for seed in args.seeds.split(",")]
        logs += [math.log10(loss) if loss > 0 else -math.inf for loss in losses]
        print(f"{item:26} {' '.join(f'{loss:.1e}' for loss in losses)}", flush=True)
    print(f"mean of log10 over {len(logs)} runs: {statistics.mean(logs):.3f}")


if __name__ == "__main__":
    main()

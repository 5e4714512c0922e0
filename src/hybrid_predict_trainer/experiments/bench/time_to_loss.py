"""Wall-clock and CPU time until the final loss of tuned Adam, on full-batch tasks; price of a step in Adam's.

    python -m hybrid_predict_trainer.experiments.bench.time_to_loss --steps 2000 --seeds 0,1,2

Adam gets the best rate of the task's grid (one seed that is not judged) and a linear decay to zero.  Ours has the
same weights, the same points and Adam at the same rate and schedule; it ends at the first loss at or below Adam's. S is
the ratio of the times.  The price is the CPU time that a forward of ours takes, all that is done beside it included,
times three, over that of a step of Adam.  One thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...tasks import TaskSettings, make_task
from ...trainer import HybridTrainer

#: Seed of the runs that choose the rate; multiple of Adam's time after which a run of ours has lost.
SWEEP_SEED, PATIENCE = 100, 3.0
#: Settings of our arms, and whether residuals are handed in.
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "default": ({}, True), "without residuals": ({}, False), "gauss_newton": ({"predictor.type": "gauss_newton"}, True),
    "wolfe": ({"predictor.type": "quasi_newton", "predictor.quasi_newton.form": "wolfe"}, False),
}  # fmt: skip


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 1e-6))


def plain(task: Any, seed: int, rate: float, steps: int) -> dict[str, float]:
    """Adam to the end of its schedule: the least loss on the way, and times."""
    model, batch = task.build_model(seed), next(iter(task.batches(seed)))
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule, best = _schedule(optimizer, steps), math.inf
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        best = min(best, float(loss.detach()))
    return {"loss": best, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def ours(task: Any, arm: str, seed: int, rate: float, steps: int, mark: float, limit: float) -> dict[str, float]:
    """The trainer until the mark: loss, times, and forwards."""
    values, with_residuals = ARMS[arm]
    model, batch = task.build_model(seed), next(iter(task.batches(seed)))
    optimizer = torch.optim.Adam(model.parameters(), rate)
    count, seen = 0, math.inf

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = model.register_forward_pre_hook(counted)
    cpu, wall = time.process_time(), time.perf_counter()
    trainer = HybridTrainer(
        model, optimizer, with_values(HybridTrainerConfig(), values), loss_fn=task.loss_fn,
        lr_scheduler=_schedule(optimizer, steps), residual_fn=task.residual_fn if with_residuals else None,
    )  # fmt: skip

    def look(result: Any) -> None:
        nonlocal seen
        seen = min(seen, float(result.loss_tensor))

    trainer.fit(
        itertools.repeat(batch), total_steps=steps, progress_callback=look,
        should_stop=lambda: seen <= mark or time.process_time() - cpu > limit,
    )  # fmt: skip
    found = {"loss": seen, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "forwards": count}
    hook.remove()
    return found


def compare(task: Any, seeds: Sequence[int], steps: int, arms: Sequence[str]) -> dict[str, Any]:
    """S by wall-clock and by CPU time of each arm, by seed; and the price of a step."""
    plain(task, SWEEP_SEED, task.defaults.lr, 50)  # what the first step of a kind takes is nobody's
    rate = min(task.defaults.lr_grid, key=lambda r: plain(task, SWEEP_SEED, r, steps)["loss"])
    rows: dict[str, dict[str, list[float]]] = {arm: {"S_wall": [], "S_cpu": [], "price": []} for arm in arms}
    marks = []
    for seed in seeds:
        base = plain(task, seed, rate, steps)
        marks.append(base["loss"])
        for arm in arms:
            found = ours(task, arm, seed, rate, steps, base["loss"], PATIENCE * base["cpu_s"])
            reached = found["loss"] <= base["loss"]
            rows[arm]["S_wall"].append(base["wall_s"] / found["wall_s"] if reached else 0.0)
            rows[arm]["S_cpu"].append(base["cpu_s"] / found["cpu_s"] if reached else 0.0)
            rows[arm]["price"].append(3 * found["cpu_s"] / found["forwards"] / (base["cpu_s"] / steps))
    return {"rate": rate, "adam": marks, "arms": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; rows as JSON lines with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="pinn-poisson,oscillator,regression,pinn-burgers")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for name, dtype in itertools.product(args.tasks.split(","), args.dtypes.split(",")):
        task: Any = make_task(name, TaskSettings(dtype=dtype))
        row = {
            "task": name,
            "dtype": dtype,
            "steps": args.steps,
            **compare(task, seeds, args.steps, args.arms.split(",")),
        }
        if args.out:
            with Path(args.out).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{name} {dtype}: Adam at {row['rate']:g} ends at {statistics.median(row['adam']):.1e}")
        for arm, found in row["arms"].items():
            told = {key: ", ".join(f"{v:.1f}" for v in values) for key, values in found.items()}
            print(
                f"  {arm:18s} S by wall-clock {told['S_wall']}; by CPU {told['S_cpu']}; price of a step {told['price']}"
            )
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Final loss and error at equal CPU time, on full-batch tasks: ours beside what experts use.

    python -m hybrid_predict_trainer.experiments.bench.clock --tasks pinn-poisson,regression --seconds 5 --seeds 0,1

With ``--fresh N`` the points are drawn afresh every N steps, which only first-order methods and ours can take; the loss
is that on the validation points then.

All methods have the same weights, the same points, one thread and the same CPU time of this process (``process_time``,
so that a busy machine slows all of them alike); they take turns, seed by seed, in one process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...config.settings import HybridTrainerConfig
from ...config.toml import preset_config, with_values
from ...tasks import TaskSettings, make_task
from ...trainer import HybridTrainer
from ..baselines.second_order import FIRST_RATE, Flat
from ..baselines.second_order import METHODS as FULL_BATCH

TASKS = (
    "pinn-poisson", "oscillator", "regression", "pinn-burgers", "pinn-allen-cahn", "pinn-klein-gordon", "pinn-inverse",
)  # fmt: skip
#: Steps that no run reaches: it ends by its time.
ENDLESS = 10_000_000
#: Points of a curve.
LOOKS = 200

#: Called with the loss at the weights that a method has reached.
Watch = Callable[[float], None]
#: (task, model, batches, seconds, first learning rate, watch)
Method = Callable[[Any, torch.nn.Module, Iterator[Any], float, float, Watch], None]


def _ours(predictor: str, **values: Any) -> Method:
    def train(
        task: Any, model: torch.nn.Module, batches: Iterator[Any], seconds: float, rate: float, watch: Watch
    ) -> None:
        config = HybridTrainerConfig()
        config = preset_config("full_batch") if predictor == "quasi_newton" else config
        config = with_values(config, {"predictor.type": predictor, **values})
        started = time.process_time()
        optimizer = torch.optim.Adam(model.parameters(), rate)

        def share() -> float:
            return max(0.0, 1 - (time.process_time() - started) / seconds)

        # never 0: weights that are not trained are not moved either, and a run may owe the way back to better ones
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(share(), 1e-6))
        trainer = HybridTrainer(
            model, optimizer, config, loss_fn=task.loss_fn, lr_scheduler=schedule, residual_fn=task.residual_fn
        )
        trainer.fit(
            batches, total_steps=ENDLESS, should_stop=lambda: share() <= 0,
            progress_callback=lambda result: watch(result.loss),
        )  # fmt: skip

    return train


def _flat(make: Callable[[Any, Flat], Iterator[float]]) -> Method:
    def train(
        task: Any, model: torch.nn.Module, batches: Iterator[Any], seconds: float, rate: float, watch: Watch
    ) -> None:
        started = time.process_time()
        for loss in make(task, Flat(model, task.loss_fn, next(batches))):
            watch(loss)
            if time.process_time() - started > seconds:
                return

    return train


def _first_order(build: Callable[[Any], torch.optim.Optimizer]) -> Method:
    def train(
        task: Any, model: torch.nn.Module, batches: Iterator[Any], seconds: float, rate: float, watch: Watch
    ) -> None:
        started, optimizer = time.process_time(), build(model.parameters())
        while (left := 1 - (time.process_time() - started) / seconds) > 0:
            for group in optimizer.param_groups:
                group["lr"] = rate * left
            optimizer.zero_grad()
            loss = task.loss_fn(model, next(batches))
            watch(float(loss.detach()))
            loss.backward()
            optimizer.step()

    return train


def _soap(parameters: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    found: torch.optim.Optimizer = SOAP(
        parameters, lr=FIRST_RATE, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=10
    )
    return found


METHODS: dict[str, Method] = {
    "gauss_newton": _ours("gauss_newton"),
    "portfolio": _ours("portfolio"),
    "gauss_newton-all": _ours("gauss_newton", **{"predictor.gauss_newton.rows": "all"}),
    "quasi_newton": _ours("quasi_newton"),
    "dense": _ours(
        "quasi_newton", **{"predictor.quasi_newton.form": "dense", "predictor.quasi_newton.update": "ssbroyden"}
    ),
    "wolfe": _ours("quasi_newton", **{"predictor.quasi_newton.form": "wolfe"}),
    **{name: _flat(make) for name, make in FULL_BATCH.items()},
    "soap": _first_order(_soap),
    "adam": _first_order(lambda parameters: torch.optim.Adam(parameters)),
}


#: Methods that take batches which change.
TAKE_NEW = ("portfolio", "gauss_newton-all", "gauss_newton", "quasi_newton", "dense", "wolfe", "soap", "adam")


def run(task: Any, method: str, seed: int, seconds: float, every: int = 0, rate: float = FIRST_RATE) -> dict[str, Any]:
    """Train from one seed for so much CPU time.

    Args:
        task: An equation, or regression.
        method: Of :data:`METHODS`.
        seed: Of the weights, and of points that change.
        seconds: CPU time.
        every: Steps after which the points are drawn afresh; 0: never.
        rate: First learning rate of Adam and SOAP, ours among them; it falls to zero.

    Returns:
        Loss on the training points (points that change: on the validation points), error against the true solution, and
        on the way the lowest loss so far by CPU seconds, :data:`LOOKS` times at most.
    """
    model = task.build_model(seed)
    batches = task.new_batches(seed, every) if every else iter(task.batches(seed))
    batch = next(iter(task.batches(seed)))
    curve: list[tuple[float, float]] = []
    started, wall = time.process_time(), time.perf_counter()

    def watch(loss: float) -> None:
        now, best = time.process_time() - started, min(loss, curve[-1][1] if curve else math.inf)
        if curve and now < curve[-1][0] + seconds / LOOKS:
            curve[-1] = (curve[-1][0], best)
        else:
            curve.append((now, best))

    METHODS[method](task, model, batches, seconds, rate, watch)
    spent, wall = time.process_time() - started, time.perf_counter() - wall
    with torch.no_grad():
        loss = task.evaluate(model) if every else float(task.loss_fn(model, batch))
    return {"method": method, "seed": seed, "cpu_s": spent, "wall_s": wall, "loss": loss,
            "error": task.solution_error(model), "curve": curve}  # fmt: skip


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over seeds, a line per task, dtype and method, best loss first."""
    lines = []
    cells = itertools.groupby(rows, key=lambda r: (r["task"], r["dtype"], r["preset"] or "-"))
    for (task, dtype, preset), cell in cells:
        by_method: dict[str, list[dict[str, Any]]] = {}
        for row in cell:
            by_method.setdefault(row["method"], []).append(row)
        medians = {m: statistics.median(r["loss"] for r in found) for m, found in by_method.items()}
        for m in sorted(medians, key=lambda m: medians[m] if math.isfinite(medians[m]) else math.inf):
            found = by_method[m]
            error, cpu = (statistics.median(r[k] for r in found) for k in ("error", "cpu_s"))
            cell_of = f"{task:13s} {dtype} {preset:4s} {m:13s}"
            lines.append(f"{cell_of} loss {medians[m]:.1e}  rel. error {error:.1e}  CPU {cpu:.1f} s  n = {len(found)}")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Lowest loss so far over CPU time: a panel per task and type, a line per method and seed."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    cells = sorted({(r["task"], r["dtype"], r["preset"]) for r in rows})
    methods = list(dict.fromkeys(r["method"] for r in rows))
    columns = min(len(cells), 2)
    lines = math.ceil(len(cells) / columns)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "equal time", "font.size": 9}):
        figure = Figure(figsize=(4.6 * columns, 2.7 * lines + 0.5), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flat
        for panel in axes[len(cells) :]:
            panel.set_axis_off()
        for (task, dtype, preset), panel in zip(cells, axes, strict=False):
            for number, method in enumerate(methods):
                for row in rows:
                    if (row["task"], row["dtype"], row["preset"], row["method"]) == (task, dtype, preset, method):
                        panel.semilogy(*zip(*row["curve"], strict=True), color=f"C{number}", linewidth=0.9)
            panel.set_title(" ".join(filter(None, (task, dtype, preset))), fontsize=9)
            panel.set_xlabel("CPU seconds")
            panel.set_ylabel("lowest loss")
        known = [Line2D([], [], color=f"C{number}") for number in range(len(methods))]
        figure.legend(known, methods, loc="outside upper center", ncols=min(len(methods), 4), frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; rows as JSON lines with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--dtypes", default="float64,float32")
    parser.add_argument("--methods", default="gauss_newton,quasi_newton,lm,ssbroyden,lean-lbfgs")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--presets", default="", help="10k, 50k, 200k: weights; the task's own where none is named")
    parser.add_argument("--points", type=int, help="training points; the task's own where none is said")
    parser.add_argument("--fresh", type=int, default=0, metavar="N", help="points drawn afresh every N steps")
    parser.add_argument("--rate", type=float, default=FIRST_RATE, help="first learning rate of Adam and SOAP")
    parser.add_argument("--out", help="rows as JSON lines are added to this file")
    parser.add_argument("--plot", metavar="FILE", help="losses over CPU time as a picture (svg, png, pdf)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    methods, rows = args.methods.split(","), []
    if args.fresh:
        methods = [m for m in methods if m in TAKE_NEW]
    for name, dtype, preset in itertools.product(*(v.split(",") for v in (args.tasks, args.dtypes, args.presets))):
        task: Any = make_task(name, TaskSettings(dtype=dtype, preset=preset or None, batch_size=args.points))
        cell = {"task": name, "dtype": dtype, "preset": preset, "points": args.points, "rate": args.rate}
        for method in methods:  # what the first step of a kind takes is nobody's
            run(task, method, 1_000, 0.3, args.fresh, args.rate)
        for seed in args.seeds.split(","):
            for method in methods:
                row = {**cell, **run(task, method, int(seed), args.seconds, args.fresh, args.rate)}
                rows.append(row)
                if args.out:
                    with Path(args.out).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
        print(format_table([r for r in rows if all(r[key] == value for key, value in cell.items())]), flush=True)
    if args.plot:
        draw(rows, Path(args.plot))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`hpt bench stack`: the whole stack against conventional training, one factor after the other.

Conventional is what is usually meant by it: float32, eager, unfused AdamW, attention written out.  Every row adds one
factor to those before it; prediction comes last, so that its figure is what it adds to a run that has everything else.

All rows train from the same seeds on the same batches, in one process, in slices that take turns: what slows the
machine slows all of them, and a ratio is taken within a round.  Time is that of training; compiling, the first steps
and validation are left out of it and told apart.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from ...records import DivergenceError
from ...tasks import Batch
from ...tell.sinks import jsonable
from ...trainer import HybridTrainer
from ..arms.drive import wait_for_device
from ..arms.environment import environment
from ..arms.options import InputError, Options, one_line
from ..compare.equal_loss import Point, over_seeds, seed_speedup
from ..report.text import aligned
from ..run_arm import build_trainer, steps_of
from .factors import CONVENTIONAL, FACTORS, NOT_HERE, Rung, attention_of, climb

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Slice:
    """What one turn of a run came to."""

    seconds: float
    steps: float  # of the schedule

    @property
    def step_ms(self) -> float:
        """Milliseconds per step of the schedule; NaN for an empty slice (the run had gone ahead)."""
        return 1e3 * self.seconds / self.steps if self.steps > 0 else math.nan


@dataclass(slots=True)
class Training:
    """One run of a rung, advanced slice by slice."""

    rung: Rung
    budget: float
    steps: int
    trainer: HybridTrainer
    batches: Iterator[Batch]
    slices: list[Slice] = field(default_factory=list)
    error: str = ""

    @property
    def wall_s(self) -> float:
        """Seconds of training so far."""
        return math.fsum(s.seconds for s in self.slices)

    def advance(self, share: float) -> None:
        """Train on to that share of the schedule, timed."""
        run = self.trainer.run
        start, target = run.position, math.ceil(share * self.steps)
        if self.error or start >= target:
            self.slices.append(Slice(0.0, 0.0))
            return
        with attention_of(self.rung):
            wait_for_device(self.trainer)
            started = time.perf_counter()
            try:
                self.trainer.fit(
                    self.batches,
                    total_steps=self.steps,
                    # the last slice ends as a run does: not in the middle of a jump's probation
                    should_stop=lambda: target < self.steps and run.position >= target and not run.batches.free,
                )
            except DivergenceError as diverged:
                self.error = one_line(str(diverged))
            wait_for_device(self.trainer)
            seconds = time.perf_counter() - started
        self.slices.append(Slice(seconds, float(run.position - start)))


# ---- running ----------------------------------------------------------------------------------------------


def measure(
    *,
    preset: str = "0.9M",
    steps: int = 200,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    rounds: int = 10,
    budgets: Sequence[float] = (0.5, 2.0),
    batch_size: int | None = None,
    context: int | None = None,
    data: str | None = None,
    data_bytes: int | None = None,
    lr: float | None = None,
    without: Collection[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train every row and return the table, JSON-able.

    Args:
        preset: Size of the gpt task's model.
        steps: Length of every row's run.
        seeds: Of model and data order; every row runs from each.
        device: Where all rows train.
        rounds: Slices of a run; rows take turns slice by slice, the order turning round with every round.
        budgets: Further conventional runs, in multiples of ``steps``: what equal loss is read from.
        batch_size: Sequences per batch; None: the preset's.
        context: Tokens per sequence; None: the preset's.
        data: As ``--data`` of ``hpt train``.
        data_bytes: Read at most so many bytes of text.
        lr: Peak learning rate of all rows; None: the preset's.
        without: Factors to leave out, names of :data:`FACTORS`.
        note: Takes lines for a person who waits.

    Raises:
        InputError: a name or size does not fit, or conventional training does not work here.
    """
    unknown = sorted(set(without) - set(FACTORS))
    if unknown:
        raise InputError(f"unknown factor {unknown[0]!r}: must be one of {', '.join(FACTORS)}")
    if not seeds or rounds < 1 or steps < rounds:
        raise InputError(f"at least one seed and 1 <= rounds <= steps are needed, got {rounds} rounds, {steps} steps")
    if any(not b > 0 for b in budgets):
        raise InputError(f"budgets must be > 0, got {', '.join(f'{b:g}' for b in budgets)}")
    options = Options(
        task="gpt", preset=preset, steps=steps, device=device, batch_size=batch_size, context=context, data=data,
        data_bytes=data_bytes, lr=lr,
    )  # fmt: skip
    rungs = climb(options, without, note)
    finished: list[tuple[int, list[Training], list[float]]] = []
    for number, seed in enumerate(seeds):
        trainings = start(rungs, budgets, seed)
        note(f"seed {seed}: {len(trainings)} runs take turns")
        take_turns(trainings, rounds, first=number * rounds, note=note)
        finished.append((seed, trainings, final_losses(rungs[0], trainings)))
    conventional = rungs[0].setup
    assert conventional is not None
    return jsonable({  # type: ignore[no-any-return]
        "schema": 1, "what": "stack", "steps": steps, "seeds": list(seeds), "rounds": rounds,
        "budgets": sorted({*budgets, 1.0}), "rows": format_table(rungs, finished),
        "task": conventional.task.describe(), "recipe": asdict(conventional.recipe),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "environment": environment(device),
    })  # fmt: skip


def start(rungs: Sequence[Rung], budgets: Sequence[float], seed: int) -> list[Training]:
    """Fresh runs of every rung that is here, and of conventional training at the other budgets."""
    wanted = [(rung, 1.0) for rung in rungs if rung.setup is not None]
    wanted += [(rungs[0], budget) for budget in sorted(set(budgets) - {1.0})]
    trainings = []
    for rung, budget in wanted:
        setup = rung.setup
        assert setup is not None
        steps, predict = steps_of(setup, budget), "prediction" in rung.factors
        trainer = build_trainer(setup, lr=setup.recipe.lr, steps=steps, seed=seed, predict=predict)
        trainings.append(
            Training(rung=rung, budget=budget, steps=steps, trainer=trainer, batches=setup.task.batches(seed))
        )
    return trainings


def take_turns(
    trainings: Sequence[Training], rounds: int, *, first: int = 0, note: Callable[[str], None] = lambda line: None
) -> None:
    """Advance all runs to their ends, slice by slice.

    Args:
        trainings: The runs.
        rounds: Slices per run.
        first: Number of the first round, which decides the order.
        note: Called after every round.
    """
    for number in range(rounds):
        for training in in_turn(trainings, first + number):
            training.advance((number + 1) / rounds)
        note(f"round {number + 1} of {rounds}")


def in_turn(items: Sequence[T], number: int) -> list[T]:
    """The order of a round: forwards in even ones, backwards in odd ones, so that a steady drift favours nobody."""
    return list(items) if number % 2 == 0 else list(reversed(items))


def final_losses(conventional: Rung, trainings: Sequence[Training]) -> list[float]:
    """Validation loss of every run's weights, all in conventional precision: the rows differ in training only."""
    setup = conventional.setup
    assert setup is not None
    judge: nn.Module = setup.task.build_model(0)
    losses = []
    for training in trainings:
        judge.load_state_dict(training.trainer.run.subject.model.state_dict())
        losses.append(math.nan if training.error else setup.task.evaluate(judge))
    return losses


Finished = Sequence[tuple[int, list[Training], list[float]]]


# ---- figures ----------------------------------------------------------------------------------------------


def format_table(rungs: Sequence[Rung], finished: Finished) -> list[dict[str, Any]]:
    """One row per rung: paired ratios of the rounds, losses over seeds, equal-loss time ratio."""
    found: list[dict[str, Any]] = []
    product, before = 1.0, CONVENTIONAL
    for rung in rungs:
        about = "float32, eager, unfused, attention written out" if rung.name == CONVENTIONAL else FACTORS[rung.name]
        row: dict[str, Any] = {"name": rung.name, "about": about, "factors": sorted(rung.factors)}
        if rung.setup is None:
            found.append({**row, "status": NOT_HERE, "reason": rung.reason})
            continue
        times, ratios = step_ms(rung.name, finished), paired(CONVENTIONAL, rung.name, finished)
        steps = paired(before, rung.name, finished)
        product *= _median(steps)
        losses, before = losses_of(rung.name, finished), rung.name
        found.append({
            **row, "status": "measured", "reason": "",
            "step_ms": _median(times), "ratio": _median(ratios), "ratio_p10_p90": _spread(ratios), "n": len(ratios),
            "factor": _median(steps), "factor_p10_p90": _spread(steps), "cumulative": product,
            "final_val_loss": statistics.fmean(losses),
            "final_val_loss_std": statistics.stdev(losses) if len(losses) > 1 else None,
            "final_val_loss_per_seed": losses, "wall_s": statistics.fmean(walls_of(rung.name, finished)),
            "startup_s": rung.startup_s, "attention_kernels": rung.attention_kernels,
            **equal_loss_of(rung.name, finished), **jumps_of(rung.name, finished),
            "errors": [t.error for _, runs, _ in finished for t in runs if t.error and t.rung.name == rung.name],
        })  # fmt: skip
    return found


def _of(name: str, runs: Sequence[Training]) -> int:
    return next(i for i, t in enumerate(runs) if t.rung.name == name and t.budget == 1.0)


def step_ms(name: str, finished: Finished) -> list[float]:
    """Milliseconds per step of a row in every round of every seed."""
    return [s.step_ms for _, runs, _ in finished for s in runs[_of(name, runs)].slices]


def paired(reference: str, name: str, finished: Finished) -> list[float]:
    """Time of a row's step under that of another in the same round: above 1 is faster than the reference."""
    both = zip(step_ms(reference, finished), step_ms(name, finished), strict=True)
    return [a / b for a, b in both if math.isfinite(a / b)]


def losses_of(name: str, finished: Finished) -> list[float]:
    """Final validation loss, seed by seed."""
    return [losses[_of(name, runs)] for _, runs, losses in finished]


def walls_of(name: str, finished: Finished) -> list[float]:
    """Seconds of training, seed by seed."""
    return [runs[_of(name, runs)].wall_s for _, runs, _ in finished]


def equal_loss_of(name: str, finished: Finished) -> dict[str, Any]:
    """Seconds conventional training needs for the row's final loss, over the seconds of the row."""
    per_seed = []
    for _, runs, losses in finished:
        ends = zip(runs, losses, strict=True)
        plain = [Point(t.wall_s, loss) for t, loss in ends if t.rung.name == CONVENTIONAL]
        i = _of(name, runs)
        per_seed.append(seed_speedup(Point(runs[i].wall_s, losses[i]), plain))
    found = over_seeds(per_seed)
    return {
        "equal_loss_time_ratio": found.value, "equal_loss_kind": found.kind, "equal_loss_ci95": found.ci95,
        "equal_loss_reason": found.reason,
    }  # fmt: skip


def jumps_of(name: str, finished: Finished) -> dict[str, int]:
    """Jumps over all seeds."""
    counters = [runs[_of(name, runs)].trainer.run.meter for _, runs, _ in finished]
    return {
        "num_jumps_proposed": sum(c.num_jumps_proposed for c in counters),
        "num_jumps_accepted": sum(c.num_jumps_accepted for c in counters),
    }


def _median(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return statistics.median(finite) if finite else math.nan


def _spread(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[0], deciles[-1]


# ---- for a person -----------------------------------------------------------------------------------------

HEAD = ("row", "step ms", "factor", "cumulative", "measured", "p10 - p90", "final val loss", "equal loss", "start-up s")


def format_text(result: Mapping[str, Any]) -> str:
    """The table, what is not here and why, and what the figures mean."""
    lines = [_line(row) for row in result["rows"]]
    where = result["environment"]
    about = f"gpt {result['task']['preset']}, batch {result['task']['batch_size']} x {result['task']['context']}"
    told = [
        f"{about}, {result['steps']} steps, {len(result['seeds'])} seed(s), {result['rounds']} rounds, "
        f"{where.get('gpu', where['cpu'])}",
        "",
        *aligned(HEAD, lines),
        "",
        *(f"{row['name']}: {NOT_HERE}, {row['reason']}" for row in result["rows"] if row["status"] == NOT_HERE),
        *(
            f"{row['name']}: the compiler replaced {row['attention_kernels']} written-out attentions by its own kernel"
            for row in result["rows"]
            if row.get("attention_kernels") and "attention" not in row["factors"]
        ),
        "factor: over the row before it; cumulative: their product; measured: over conventional; all by paired time "
        "per step of the schedule.",
        "equal loss: seconds conventional training needs to end at the row's loss, over the row's; below or above "
        "its budgets a bound.",
        f"One learning rate for all rows; float32 products in precision {result['float32_matmul_precision']!r}.",
    ]
    return "\n".join(told)


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = row["name"] if row["name"] == CONVENTIONAL else f"+ {row['name']}"
    if row["status"] == NOT_HERE:
        return (name, NOT_HERE, *("-" for _ in HEAD[2:]))
    spread, std = row["ratio_p10_p90"], row["final_val_loss_std"]
    bound = {"at least": ">= ", "at most": "<= "}.get(row["equal_loss_kind"], "")
    loss = "diverged" if row["final_val_loss"] is None else f"{row['final_val_loss']:.4g}"
    return (
        name,
        _number(row["step_ms"], ".1f"),
        _number(row["factor"], ".3f"),
        _number(row["cumulative"], ".3f"),
        _number(row["ratio"], ".3f"),
        "-" if spread is None else f"{spread[0]:.3f} - {spread[1]:.3f}",
        loss + (f" ± {std:.2g}" if std is not None else ""),
        "unknown" if row["equal_loss_time_ratio"] is None else f"{bound}{row['equal_loss_time_ratio']:.3f}",
        f"{row['startup_s']:.1f}",
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

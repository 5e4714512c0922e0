"""Short runs on copies: plain at several lengths, predicted, and each of its two parts alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...cost import STEP_UNITS
from ...records import DivergenceError, StepResult
from ...trainer import HybridTrainer
from ..compare.equal_loss import Point, SeedSpeedup, seed_speedup
from .observe import Displacements
from .subject import Subject, mean_loss

#: Only step sizes: no jump is proposed.  A threshold of 1, or a longest jump of 0, would rule out step sizes as well.
NO_JUMPS = {"training.confidence_threshold": 0.999, "training.explore_outcomes": 0}
#: Only jumps: the optimizer's own steps are as they are.
NO_SIZES = {
    "training.max_lr_multiplier": 1.0, "training.min_group_factor": 1.0, "lookahead.extrapolation": 0.0,
    "lookahead.damping": 0.0, "training.recipe": "off",
}  # fmt: skip
#: Lengths of plain runs, in lengths of the pilot: tried outwards until the predicted run's loss lies between two.
LONGER = (1.5, 2.0, 4.0, 8.0, 16.0)
SHORTER = (0.67, 0.5)
MAX_LONGER_NOISY = 4.0
RATES = (1 / 3, 3.0)
PARTS = ("all", "jumps", "sizes")


@dataclass(slots=True)
class Pilot:
    """What a short run came to; ``loss`` is NaN where it diverged."""

    cost: float
    loss: float
    jumps: int = 0

    @property
    def point(self) -> Point:
        """For the comparison."""
        return Point(self.cost, self.loss)


@dataclass(slots=True)
class Replicate:
    """All pilots of one order of the data."""

    plain: dict[float, Pilot] = field(default_factory=dict)
    parts: dict[str, Pilot] = field(default_factory=dict)
    rates: dict[float, Pilot] = field(default_factory=dict)

    def speedups(self) -> dict[str, SeedSpeedup]:
        """S of the whole and of each part alone."""
        ends = [p.point for p in self.plain.values()]
        return {name: seed_speedup(pilot.point, ends) for name, pilot in self.parts.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotPlan:
    """How long pilots are, and when no more are begun.

    Attributes:
        steps: of a pilot.
        replicates: orders of the data.
        deadline: by ``time.perf_counter``; infinite: none.
        exact: every batch is the same.
        config: recommended settings.
    """

    steps: int
    replicates: int
    deadline: float
    exact: bool
    config: HybridTrainerConfig

    @property
    def late(self) -> bool:
        """Whether no further pilot is to be begun."""
        return time.perf_counter() > self.deadline


def train(
    subject: Subject, config: HybridTrainerConfig, steps: int, seed: int, held: list[Any], *, rate: float = 1.0,
    watch: Callable[[Any], Callable[[StepResult], None]] | None = None,
) -> Pilot:  # fmt: skip
    """One pilot on copies.

    Args:
        subject: What is trained.
        config: With ``enabled=False`` it is the plain loop.
        steps: On the clock.
        seed: Of the order of the data.
        held: Batches to measure the loss on.
        rate: Factor on the learning rate.
        watch: Takes the model and returns what is called after every step.
    """
    model, optimizer, loss_fn = subject.copy()
    for group in optimizer.param_groups:
        group["initial_lr"] = rate * group.get("initial_lr", group["lr"])
    schedule = subject.scheduler(optimizer, steps)
    settings = with_values(config, {
        "training.gradient_clip_norm": subject.grad_clip, "metrics.path": "", "checkpoint.directory": "",
    })  # fmt: skip
    trainer = HybridTrainer(model, optimizer, settings, loss_fn=loss_fn, lr_scheduler=schedule)
    note = None if watch is None else watch(model)
    try:
        trainer.fit(subject.batches(seed), total_steps=steps, progress_callback=note)
    except DivergenceError:
        return Pilot(trainer.statistics()["cost_units"] / STEP_UNITS, math.nan)
    counts = trainer.statistics()
    loss = mean_loss(subject, model, loss_fn, held)
    return Pilot(counts["cost_units"] / STEP_UNITS, loss if math.isfinite(loss) else math.nan,
                 int(counts["num_jumps_accepted"]))  # fmt: skip


def part(config: HybridTrainerConfig, name: str) -> HybridTrainerConfig:
    """The settings with one of the two parts left out."""
    values: dict[str, dict[str, Any]] = {"all": {}, "jumps": NO_SIZES, "sizes": NO_JUMPS}
    return with_values(config, values[name])


def replicate(
    subject: Subject, plan: PilotPlan, seed: int, held: list[Any], tell: Callable[[str], None],
    watch: Callable[[Any], Callable[[StepResult], None]] | None = None,
) -> Replicate:  # fmt: skip
    """All pilots of one order of the data; plain lengths are tried until they hold the predicted run's loss."""
    off = replace(plan.config, enabled=False)
    found = Replicate()

    def plain(length: float) -> Pilot:
        steps = max(1, round(length * plan.steps))
        found.plain[length] = train(subject, off, steps, seed, held, watch=watch if length == 1.0 else None)
        tell(f"pilot, plain, {steps} steps: loss {found.plain[length].loss:.5g}")
        return found.plain[length]

    plain(1.0)
    for name in PARTS:
        if plan.late and found.parts:
            break
        found.parts[name] = train(subject, part(plan.config, name), plan.steps, seed, held)
        tell(f"pilot, {name}: loss {found.parts[name].loss:.5g}, {found.parts[name].jumps} jumps")
    goal = found.parts["all"].loss
    better = math.isfinite(goal) and not found.plain[1.0].loss <= goal
    longest = math.inf if plan.exact else MAX_LONGER_NOISY
    for length in [b for b in LONGER if b <= longest] if better else SHORTER:
        if plan.late:
            break
        reached = plain(length).loss <= goal
        if reached == better:
            break
    return found


def rates(subject: Subject, plan: PilotPlan, seed: int, held: list[Any], found: Replicate) -> None:
    """Plain pilots at a third and at three times the rate."""
    off = replace(plan.config, enabled=False)
    for rate in RATES:
        if not plan.late:
            found.rates[rate] = train(subject, off, plan.steps, seed, held, rate=rate)


def displacements(into: list[Displacements]) -> Callable[[Any], Callable[[StepResult], None]]:
    """A watch that keeps the displacements of the first run that it sees."""

    def watch(model: Any) -> Callable[[StepResult], None]:
        seen = Displacements(model)
        into.append(seen)
        return lambda _: seen.step()

    return watch

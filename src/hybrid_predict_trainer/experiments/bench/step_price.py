"""``hpt bench overhead --model tiny``: CPU time per real step beyond the plain loop's, on models with cheap steps.

The bare loop, this build and, where asked for, an earlier one take the same steps in blocks by turns, in an order that
changes with every round.  A round begins anew with the same weights and data, so a block of one round is the same work
in every other, and its least CPU time over the rounds is its price.  The price of a proposal is part of it: what is
reported is CPU time over *real* steps, less that of the bare loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arms.environment import environment
from ..report.text import aligned
from .builds import Build
from .workloads import Workload, workload

#: Calls of ``step`` per block: long against the clock's resolution, short against what a machine does by the way.
BLOCK = 50


@dataclass(slots=True)
class Side:
    """One of those that take turns.

    Attributes:
        name: For the table.
        start: () -> a step function of a run that begins anew, and its counts of real steps and proposals.
        build: Whose code runs; None: no build's.
        seconds: By block, the least over rounds.
        real_steps: By block.
        figures: Of the run at its end.
    """

    name: str
    start: Callable[[], tuple[Callable[[Any], object], Callable[[], Mapping[str, Any]]]]
    build: Build | None = None
    seconds: list[float] = field(default_factory=list)
    real_steps: list[int] = field(default_factory=list)
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_step(self) -> float:
        """CPU seconds per real step."""
        return sum(self.seconds) / max(sum(self.real_steps), 1)


def measure(
    name: str, *, num_steps: int = 1000, rounds: int = 3, against: Path | None = None, note: Callable[[str], None]
) -> dict[str, Any]:
    """Take turns.

    Args:
        name: Of the workload.
        num_steps: Calls of ``step``, proposals included.
        rounds: How often everything is done anew.
        against: A checkout of an earlier build.
        note: Takes lines for a person who waits.

    Raises:
        ValueError: no such workload, or no such checkout.
    """
    work = workload(name)
    sides = [_plain(work), _ours(work, "this build", Build())]
    if against is not None:
        sides.append(_ours(work, "earlier build", Build(against)))
    for k in range(rounds):
        _round(work, sides[k % len(sides) :] + sides[: k % len(sides)], num_steps)
        note(f"round {k + 1} of {rounds}: " + ", ".join(f"{s.name} {1e6 * s.per_step:.0f} us" for s in sides))
    plain, ours, *earlier = sides
    rows = [_row(side, plain) for side in sides]
    ratio = None
    if earlier:
        ratio = (ours.per_step - plain.per_step) / (earlier[0].per_step - plain.per_step)
    return {
        "workload": work.name, "about": work.about, "num_steps": num_steps, "rounds": rounds, "rows": rows,
        "extra_over_earlier": ratio, "environment": environment("cpu"),
    }  # fmt: skip


def _plain(work: Workload) -> Side:
    def start() -> tuple[Callable[[Any], object], Callable[[], Mapping[str, Any]]]:
        model, optimizer, schedule = work.parts()
        count = 0

        def step(batch: Any) -> None:
            nonlocal count
            optimizer.zero_grad(set_to_none=True)
            loss = work.loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            schedule.step()
            loss.item()
            count += 1

        return step, lambda: {"num_real_steps": count, "num_jumps_proposed": 0}

    return Side("bare loop", start)


def _ours(work: Workload, name: str, build: Build) -> Side:
    def start() -> tuple[Callable[[Any], object], Callable[[], Mapping[str, Any]]]:
        model, optimizer, schedule = work.parts()
        hpt = build.package
        trainer = hpt.HybridTrainer(model, optimizer, hpt.HybridTrainerConfig(), work.loss_fn, schedule)
        return trainer.step, trainer.statistics

    return Side(name, start, build)


def _round(work: Workload, sides: Sequence[Side], num_steps: int) -> None:
    runs = []
    for side in sides:
        with _using(side):
            runs.append((side, *side.start(), work.batches()))
    for block in range(num_steps // BLOCK):
        for side, step, figures, batches in runs if block % 2 == 0 else reversed(runs):
            with _using(side):
                before = int(figures()["num_real_steps"])
                seconds = _timed(step, batches)
                side.figures = figures()
            num_real = int(side.figures["num_real_steps"]) - before
            if block == len(side.seconds):
                side.seconds.append(seconds)
                side.real_steps.append(num_real)
            side.seconds[block] = min(side.seconds[block], seconds)


def _timed(step: Callable[[Any], object], batches: Iterator[Any]) -> float:
    ready = [next(batches) for _ in range(BLOCK)]
    began = time.process_time()
    for batch in ready:
        step(batch)
    return time.process_time() - began


def _using(side: Side) -> AbstractContextManager[object]:
    """The build of a side, if it has one."""
    return nullcontext() if side.build is None else side.build.used()


def _row(side: Side, plain: Side) -> dict[str, Any]:
    return {
        "side": side.name,
        "us_per_real_step": 1e6 * side.per_step,
        "times_plain": side.per_step / plain.per_step,
        "extra_us": 1e6 * (side.per_step - plain.per_step),
        "extra_in_plain_steps": side.per_step / plain.per_step - 1,
        "num_real_steps": sum(side.real_steps),
        "num_jumps_proposed": side.figures.get("num_jumps_proposed", 0),
    }


def format_text(result: Mapping[str, Any]) -> str:
    """The figures for a person."""
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in result["rows"]]
    lines = [f"{result['workload']}: {result['about']}", *aligned(tuple(result["rows"][0]), cells)]
    if result["extra_over_earlier"] is not None:
        lines.append(f"extra CPU time per real step, over the earlier build's: {result['extra_over_earlier']:.3f}")
    return "\n".join(lines)

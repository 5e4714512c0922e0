"""What the learned scale looks at: the cosine of a step with the next gradient, at several rates of plain training.

``python -m hybrid_predict_trainer.experiments.step_cosines [TASK [PRESET [STEPS]]]``; the second table has the first
steps group by group.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import torch

from ...move.edge_test import step_cosines
from ...tasks import TaskSettings, build_optimizer, build_scheduler, make_task, with_steps
from ...weights import algebra as weights
from ...weights.parameters import predicted_parameters
from ..report.text import aligned

#: Multiples of the task's own rate.
MULTIPLES = (1 / 30, 1 / 10, 1 / 3, 1.0, 3.0)
NUM_PARTS = 4
#: Of those, the ones the table by groups has, and its parts of the run: warm-up, the steps that may be cut, later.
GROUP_MULTIPLES = (1 / 3, 1.0, 3.0)
GROUP_ENDS = (5, 20, 50, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Mean over a part of one run."""

    multiple: float  # of the task's rate
    first: int  # steps from ... up to, excluded
    last: int
    cosine: float  # mean of h
    noise: float  # standard deviation of one step's h
    loss: float  # training loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Every step but the first of one plain run."""

    roles: tuple[str, ...]  # of the groups
    of_all: list[tuple[float, float]]  # (h, loss)
    of_group: list[list[float]]  # step by step, (G,) h_g


def cosines(task_name: str, preset: str | None, steps: int, multiple: float, seed: int = 0) -> Trace:
    """Run a task plainly at a multiple of its own rate."""
    task = make_task(task_name, TaskSettings(preset=preset))
    recipe = with_steps(replace(task.defaults, lr=task.defaults.lr * multiple), steps)
    torch.manual_seed(seed)
    model = task.build_model(seed)
    optimizer = build_optimizer(model, recipe)
    schedule = build_scheduler(optimizer, recipe.schedule, steps, recipe.warmup_steps, recipe.decay_frac)
    parameters, groups = predicted_parameters(model, optimizer)
    before: list[torch.Tensor] = []
    found = Trace(roles=groups.roles, of_all=[], of_group=[])
    for batch, _ in zip(task.batches(seed), range(steps), strict=False):
        optimizer.zero_grad()
        loss = task.loss_fn(model, batch)
        loss.backward()
        if before:
            now = [p.detach() for p in parameters]
            h, *of_group = step_cosines([p.grad for p in parameters], before, now, groups).tolist()
            found.of_all.append((h, float(loss.detach())))
            found.of_group.append(of_group)
        if recipe.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        before = weights.clone(parameters)
        optimizer.step()
        schedule.step()
    return found


def parts(multiple: float, values: Sequence[tuple[float, float]], num_parts: int = NUM_PARTS) -> Iterator[Part]:
    """A run in equal parts.

    Args:
        multiple: Of the task's rate, for the record.
        values: (h, loss) step by step, at least two per part.
        num_parts: How many.
    """
    size = len(values) // num_parts
    for i in range(num_parts):
        piece = values[i * size : (i + 1) * size]
        h = [a for a, _ in piece]
        yield Part(
            multiple=multiple, first=i * size + 1, last=(i + 1) * size + 1, cosine=fmean(h), noise=stdev(h),
            loss=fmean(b for _, b in piece),
        )  # fmt: skip


def format_text(rows: Sequence[Part]) -> str:
    """A table."""
    cells = [
        [f"{r.multiple:.3g}", f"{r.first} - {r.last - 1}", f"{r.cosine:+.3f}", f"{r.noise:.3f}", f"{r.loss:.3f}"]
        for r in rows
    ]
    return "\n".join(aligned(("rate", "steps", "mean h", "std of h", "loss"), cells))


def group_text(traces: Mapping[float, Trace]) -> str:
    """A table of mean h_g, a line per multiple and group."""
    rows = []
    for multiple, trace in traces.items():
        for g, role in enumerate(trace.roles):
            h = [values[g] for values in trace.of_group]
            pieces = [h[start:end] for start, end in pairwise((0, *GROUP_ENDS))]
            rows.append([f"{multiple:.3g}", role, *(f"{fmean(piece):+.2f}" if piece else "" for piece in pieces)])
    head = [f"{start + 1} - {end}" for start, end in pairwise((0, *GROUP_ENDS))]
    return "\n".join(aligned(("rate", "group", *head), rows))


def main(arguments: Sequence[str]) -> None:
    """Run all multiples and print the table."""
    named: list[Any] = [*arguments, *("gpt", "0.3M", "300")[len(arguments) :]]
    task, preset, steps = str(named[0]), str(named[1]) or None, int(named[2])
    traces = {m: cosines(task, preset, steps, m) for m in MULTIPLES}
    print(format_text([p for m, trace in traces.items() for p in parts(m, trace.of_all)]))
    print()
    print(group_text({m: traces[m] for m in GROUP_MULTIPLES}))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Controls: what a user wins who mends the recipe's first steps by hand."""

from __future__ import annotations

from dataclasses import replace

from ...move.group_warmup import is_inside_a_block, shorten
from ...tasks import TaskDefaults
from ...weights import algebra as weights
from ...weights.algebra import Tensors
from ..arms.drive import Hooks
from .base import BaselineRun


def long_warmup(recipe: TaskDefaults) -> TaskDefaults:
    """The recipe with a linear warm-up of 2 / (1 - beta_2) steps (arXiv 1910.04209), half of the run at most."""
    steps = min(round(2 / (1 - recipe.betas[1])), recipe.steps // 2)
    return replace(recipe, warmup_steps=max(recipe.warmup_steps, steps))


def block_warmup(session: BaselineRun) -> Hooks:
    """Steps of matrices inside attention and MLP blocks grow linearly to their full length; others as they were."""
    run, num_steps = session.run, int(session.values["steps"])
    inside = [is_inside_a_block(role) for role in run.windows.groups.roles]
    before: Tensors = []

    def before_step() -> None:
        if run.meter.num_real_steps < num_steps:
            before[:] = weights.clone(run.subject.parameters)

    def after_step() -> None:
        if before:
            share = run.meter.num_real_steps / num_steps
            shorten(
                run.subject.parameters, before, run.windows.groups.index, [share if block else 1.0 for block in inside]
            )
            session.charge_passes(5)  # a copy; read both, write one
            before.clear()

    return Hooks(before_step=before_step, after_step=after_step)

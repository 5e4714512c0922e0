"""Other optimizers, from the packages of the ``[bench]`` extra."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...tasks import TaskDefaults, TaskSettings
from ...tasks.base import missing_extra
from ...tasks.recipes import decay_groups
from ...weights import algebra as weights
from ..arms.drive import Hooks, recipe_optimizer
from .base import BaselineRun, Values, recipe_grid
from .flops import forward_flops, soap_basis_flops, soap_first_flops, soap_step_flops


def library(name: str) -> Any:
    """Import an optional library.

    Raises:
        ModuleNotFoundError: it is not installed; says which extra brings it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise missing_extra(name, "bench") from error


# ---- Lookahead ------------------------------------------------------------------------------------------


def lookahead_optimizer(model: nn.Module, recipe: TaskDefaults, settings: TaskSettings, values: Values) -> Optimizer:
    """The recipe's optimizer inside Lookahead (arXiv 1907.08610)."""
    inner = recipe_optimizer(model, recipe, settings)
    wrapped: Optimizer = library("pytorch_optimizer").Lookahead(inner, k=int(values["every"]), alpha=values["alpha"])
    return wrapped


def lookahead(session: BaselineRun) -> Hooks:
    """Books what the slow weights cost."""
    every = int(session.values["every"])

    def after_step() -> None:
        if session.run.meter.num_real_steps % every == 0:
            session.charge_passes(4)  # reads and writes fast and slow weights

    return Hooks(after_step=after_step)


# ---- Schedule-Free AdamW --------------------------------------------------------------------------------


def schedule_free_optimizer(
    model: nn.Module, recipe: TaskDefaults, settings: TaskSettings, values: Values
) -> Optimizer:
    """AdamWScheduleFree (arXiv 2405.15682), its warm-up at least the share of the run its authors advise."""
    built: Any = library("schedulefree").AdamWScheduleFree(
        decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(values["beta1"], recipe.betas[1]),
        weight_decay=recipe.weight_decay,
        warmup_steps=max(recipe.warmup_steps, round(values["warmup_frac"] * recipe.steps)),
    )  # fmt: skip
    built.train()
    return built  # type: ignore[no-any-return]


def schedule_free(session: BaselineRun) -> Hooks:
    """Validates at the average x; the optimizer trains at y."""
    run, optimizer = session.run, session.run.subject.optimizer

    @contextmanager
    def evaluation() -> Iterator[None]:
        y = weights.clone(run.subject.parameters)
        optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            optimizer.train()  # type: ignore[attr-defined]
            weights.copy_(run.subject.parameters, y)  # there and back again is not the same in floating point

    return Hooks(evaluation=evaluation)


# ---- Prodigy --------------------------------------------------------------------------------------------


def prodigy_optimizer(model: nn.Module, recipe: TaskDefaults, settings: TaskSettings, values: Values) -> Optimizer:
    """Prodigy (arXiv 2306.06101); the arm's rate is a multiple of the step size it finds."""
    groups = decay_groups(model, recipe.weight_decay)
    with contextlib.redirect_stdout(io.StringIO()):  # it announces its weight decay
        built: Optimizer = library("prodigyopt").Prodigy(
            groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, d_coef=values["d_coef"],
            safeguard_warmup=True, use_bias_correction=True,
        )  # fmt: skip
    return built


def prodigy(session: BaselineRun) -> Hooks:
    """Books the two vectors it keeps beyond Adam's."""
    # reads of the gradient, of w - w_0 and of s in two sums; s is updated
    return Hooks(after_step=lambda: session.charge_passes(7))


def prodigy_grid(recipe: TaskDefaults) -> tuple[float, ...]:
    """Powers of two from 0.5 on, as many as the recipe has rates: 1 is what its authors advise."""
    count = len(recipe_grid(recipe))
    return tuple(2.0 ** (i - 1) for i in range(count)) if count > 1 else (1.0,)


# ---- SOAP -----------------------------------------------------------------------------------------------


def soap_optimizer(model: nn.Module, recipe: TaskDefaults, settings: TaskSettings, values: Values) -> Optimizer:
    """SOAP (arXiv 2409.11321): Adam in the eigenbasis of Shampoo's preconditioner."""
    built: Optimizer = library("pytorch_optimizer").SOAP(
        decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=(values["beta1"], values["beta2"]),
        weight_decay=recipe.weight_decay, precondition_frequency=int(values["every"]),
        max_precondition_dim=int(values["max_dim"]),
    )  # fmt: skip
    return built


def soap(session: BaselineRun) -> Hooks:
    """Books rotations and eigenbases by their FLOPs, in forwards of this task (formulas in ``flops``)."""
    run, setup, values = session.run, session.order.setup, session.values
    every, max_dim = int(values["every"]), int(values["max_dim"])
    shapes = [tuple(p.shape) for p in run.subject.parameters]
    unit = forward_flops(setup, run.subject.model, session.order.seed)
    step, basis = soap_step_flops(shapes, max_dim) / unit, soap_basis_flops(shapes, max_dim) / unit
    first = soap_first_flops(shapes, max_dim) / unit

    def after_step() -> None:
        number = run.meter.num_real_steps
        if number == 1:  # it only looks at the first gradient
            session.charge_forwards(step / 4 + first)
        else:
            session.charge_forwards(step + (basis if (number - 1) % every == 0 else 0))

    return Hooks(after_step=after_step)

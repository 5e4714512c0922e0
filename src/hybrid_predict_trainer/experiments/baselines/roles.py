"""Rates per role set by hand: what a user can have without any trainer, and the steps that treat matrices as such.

Each is the recipe's AdamW, or SGD, with groups that have rates of their own; one base rate is tuned, with as many
trials as any other arm has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from ...move.recipe import Recipe
from ...tasks import TaskDefaults, TaskSettings, build_optimizer
from ...tasks.recipes import decay_groups, muon_adamw
from ...trainer import HybridTrainer
from ..arms.drive import (
    ArmRun,
    Experiment,
    Hooks,
    recipe_for,
    recipe_optimizer,
    recipe_schedule,
    seeded_model,
    steps_of,
)
from .base import BaselineJob, BaselineRun, Values, in_loop
from .flops import forward_flops
from .optimizers import library

#: Roles whose inputs do not grow with the width (Yang et al. 2022, arXiv 2203.03466, table 3).
INPUT_LIKE = ("embedding", "norm_bias")


def by_role(model: nn.Module, recipe: TaskDefaults, factors: Mapping[str, float], *, fused: bool = False) -> Optimizer:
    """The recipe's AdamW, SGD or Muon with a rate per role; what decay takes away is what it is at the base rate.

    Args:
        model: Whose parameters are trained.
        recipe: Base rate, betas and decay.
        factors: Role -> factor on the base rate; others have 1.
        fused: Use the fused kernel.

    Raises:
        ValueError: the recipe is none of these.
    """
    if recipe.optimizer not in ("adamw", "sgd", "muon"):
        raise ValueError(
            f"rates per role are written for AdamW, SGD and Muon, and this case trains with {recipe.optimizer}"
        )
    groups = Recipe(factors).param_groups(model, recipe.lr, groups=decay_groups(model, recipe.weight_decay))
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        return SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=fused)
    if recipe.optimizer == "muon":
        return muon_adamw(model, groups, recipe, fused=fused)
    return AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=fused)


def role_rates(model: nn.Module, recipe: TaskDefaults, settings: TaskSettings, values: Values) -> Optimizer:
    """Rates per role as the peer's values name them."""
    return by_role(model, recipe, values, fused=settings.fused)


#: Added to a run's seed where its recipe is looked for: another model and another order of the data.
FINDING_SEED_OFFSET = 2000


def found_recipe(setup: Experiment, lr: float, steps: int, seed: int) -> Recipe:
    """What the trainer's own recipe is after a run of ``steps`` steps at the settings' defaults.

    Args:
        setup: Task, recipe and trainer settings.
        lr: Rate of the run, which the recipe's factors are multiples of.
        steps: Its length.
        seed: Of its model and data.
    """
    model = seeded_model(setup, seed)
    recipe = recipe_for(setup, lr=lr, steps=steps)
    optimizer = recipe_optimizer(model, recipe, setup.settings)
    trainer = HybridTrainer(
        model, optimizer, replace(setup.config, seed=setup.config.seed + seed), loss_fn=setup.task.loss_fn,
        lr_scheduler=recipe_schedule(optimizer, recipe),
    )  # fmt: skip
    trainer.keep_no_checkpoints()
    trainer.fit(setup.task.batches(seed), total_steps=steps)
    return trainer.recipe()


def taken_home(order: BaselineJob) -> ArmRun:
    """The plain loop with the recipe that a run of ours has found, which was so many times shorter.

    The rate is the task's default, tuned by nobody, times the multiplier that was found.  The run that found it is a
    run of its own and is not charged.
    """
    setup, times = order.setup, order.values["times_longer"]
    short = max(round(steps_of(setup, order.arm.budget) / times), 1)
    found = found_recipe(setup, order.arm.lr, short, order.seed + FINDING_SEED_OFFSET)

    def optimizer(model: nn.Module, recipe: TaskDefaults, settings: TaskSettings, values: Values) -> Optimizer:
        own = replace(recipe, lr=recipe.lr * found.multiplier, weight_decay=recipe.weight_decay / found.multiplier)
        return by_role(model, own, found.rates, fused=settings.fused)

    return in_loop(optimizer=optimizer)(order)


def default_rate(recipe: TaskDefaults) -> tuple[float, ...]:
    """The task's own rate and no other."""
    return (recipe.lr,)


def mup(model: nn.Module, recipe: TaskDefaults, settings: TaskSettings, values: Values) -> Optimizer:
    """Rates as muP scales them from a base width: what does not grow with the width steps width / base faster.

    Raises:
        ValueError: the model has no embedding, which tells its width.
    """
    widths = [m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding)]
    if not widths:
        raise ValueError("mup needs a model with an embedding, which tells its width")
    factor = widths[0] / values["base_width"]
    return by_role(model, recipe, dict.fromkeys(INPUT_LIKE, factor), fused=settings.fused)


# ---- matrices ------------------------------------------------------------------------------------------------


def muon_flops(shapes: Iterable[Sequence[int]], num_iterations: int) -> float:
    """FLOPs of Newton-Schulz on matrices of m rows and n columns, m the shorter side: 2 m^2 (2 n + m) an iteration."""
    total = 0.0
    for shape in shapes:
        short, long = sorted((shape[0], math.prod(shape[1:])))
        total += num_iterations * 2.0 * short * short * (2 * long + short)
    return total


def muon(model: nn.Module, recipe: TaskDefaults, settings: TaskSettings, values: Values) -> Optimizer:
    """Muon for hidden matrices (torch.optim.Muon) and AdamW for the rest, one rate for both."""
    return build_optimizer(model, replace(recipe, optimizer="muon"), fused=settings.fused)


def normuon(model: nn.Module, recipe: TaskDefaults, settings: TaskSettings, values: Values) -> Optimizer:
    """NorMuon (arXiv 2510.05491) of pytorch_optimizer for hidden matrices and its AdamW for the rest.

    Steps have the size of AdamW's (an RMS of 0.2), so that one rate serves.
    """
    split = build_optimizer(model, replace(recipe, optimizer="muon")).param_groups
    groups = [
        {"params": g["params"], "lr": recipe.lr, "weight_decay": g["weight_decay"], "use_muon": g["use_muon"]}
        | ({} if g["use_muon"] else {"betas": recipe.betas})
        for g in split
    ]
    built: Optimizer = library("pytorch_optimizer").NorMuon(
        groups, lr=recipe.lr, momentum=recipe.momentum, update_scale="match_rms"
    )
    return built


def newton_schulz(session: BaselineRun) -> Hooks:
    """Books what making matrices orthogonal takes, by its FLOPs, in forwards of this task."""
    run, setup = session.run, session.order.setup
    unit = forward_flops(setup, run.subject.model, session.order.seed)
    held = [p for g in run.subject.optimizer.param_groups if g["use_muon"] for p in g["params"]]
    price = muon_flops([tuple(p.shape) for p in held], int(session.values["iterations"])) / unit
    return Hooks(after_step=lambda: session.charge_forwards(price))

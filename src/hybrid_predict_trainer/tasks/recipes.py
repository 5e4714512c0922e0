"""Optimizers and learning-rate schedules, by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, get_args, overload

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .base import OptimizerName, ScheduleName, TaskDefaults, unknown_name
from .low_bit import adamw_8bit


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices and convolutions decay; norms, biases and embeddings do not.

    Decay on a gain or an embedding row pulls towards a value with no meaning (GPT-3's rule, as in nanoGPT).
    A head tied to an embedding counts as the embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            (plain if p.ndim < 2 or id(p) in embeddings else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class MuonAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the rest, behind one optimizer: one schedule, one checkpoint.

    Args:
        muon: groups of 2-D parameters.
        adamw: groups of everything else.
        lr: for both; Muon's update is scaled to AdamW's RMS, so that one rate serves (Moonshot's adjustment).
        betas: AdamW's.
        momentum: Muon's.
        fused: AdamW's.
    """

    def __init__(
        self,
        muon: list[dict[str, Any]],
        adamw: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        fused: bool = False,
    ) -> None:
        """Build both inner optimizers and join their groups."""
        self._muon: torch.optim.Optimizer = torch.optim.Muon(
            muon, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw: torch.optim.Optimizer = torch.optim.AdamW(adamw, lr=lr, betas=betas, fused=fused)
        groups = [
            {**group, "use_muon": inner is self._muon}
            for inner in (self._muon, self._adamw)
            for group in inner.param_groups
        ]
        super().__init__(groups, {"lr": lr})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner, is_muon in ((self._muon, True), (self._adamw, False)):
            # Linked anew at each step, because load_state_dict replaces both containers.
            inner.state = self.state
            inner.param_groups = [group for group in self.param_groups if group["use_muon"] is is_muon]
            inner.step()
        return loss


def build_optimizer(model: nn.Module, recipe: TaskDefaults, *, fused: bool = False) -> torch.optim.Optimizer:
    """Return the optimizer the recipe names, over the groups of `decay_groups`.

    Args:
        model: whose parameters are trained.
        recipe: optimizer, lr, betas, momentum and weight_decay are read.
        fused: use the fused kernel where the optimizer has one.

    Raises:
        ValueError: the name is none of these, or the optimizer cannot be had.
        ModuleNotFoundError: it is of a library that is not installed.
    """
    groups = decay_groups(model, recipe.weight_decay)
    match recipe.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=fused)
        case "adamw8bit":
            return adamw_8bit(groups, lr=recipe.lr, betas=recipe.betas)
        case "adam":
            return torch.optim.Adam(groups, lr=recipe.lr, betas=recipe.betas, fused=fused)
        case "sgd":
            nesterov = recipe.momentum > 0
            return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=fused)
        case "muon":
            return muon_adamw(model, groups, recipe, fused=fused)
    raise unknown_name("optimizer", recipe.optimizer, get_args(OptimizerName))


def muon_adamw(
    model: nn.Module, groups: list[dict[str, Any]], recipe: TaskDefaults, *, fused: bool = False
) -> MuonAdamW:
    """Muon for hidden matrices; embeddings and the output layer stay with AdamW (Jordan et al., 2024).

    Args:
        model: Whose last linear layer is its output.
        groups: Of its parameters; each is split in two where it holds both kinds.
        recipe: lr, betas and momentum are read.
        fused: AdamW's.

    Raises:
        ValueError: there is no hidden matrix.
    """
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    hidden = {id(weight) for weight in linears[:-1]}

    def is_hidden(p: Tensor) -> bool:
        return id(p) in hidden

    muon = [{**g, "params": [p for p in g["params"] if is_hidden(p)]} for g in groups]
    adamw = [{**g, "params": [p for p in g["params"] if not is_hidden(p)]} for g in groups]
    muon, adamw = [g for g in muon if g["params"]], [g for g in adamw if g["params"]]
    if not muon:
        raise ValueError("muon needs at least one hidden nn.Linear; use adamw for this model")
    return MuonAdamW(muon, adamw, lr=recipe.lr, betas=recipe.betas, momentum=recipe.momentum, fused=fused)


def lr_factor(step: int, *, schedule: ScheduleName, total_steps: int, warmup_steps: int, decay_frac: float) -> float:
    """Return the learning rate of step `step` (from 0) as a share of the peak.

    Warm-up is linear and reaches 1 at step `warmup_steps - 1`. "linear", "cosine" and "wsd" reach 0 at
    `total_steps` and stay there; without the clamp a cosine would rise again on a run that goes on.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = max(total_steps - step, 0)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return left / max(total_steps - warmup_steps, 1)
        case "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * left / max(total_steps - warmup_steps, 1))
        case "wsd":
            return min(1.0, left / max(decay_frac * total_steps, 1))
    raise unknown_name("schedule", schedule, get_args(ScheduleName))


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    schedule: ScheduleName,
    total_steps: int,
    warmup_steps: int = 0,
    decay_frac: float = 0.25,
) -> LambdaLR:
    """Return a scheduler to be stepped once after each optimizer step.

    Its `state_dict` holds the position only: shape and length come from these arguments, so that a run can be
    resumed with a longer schedule.

    Args:
        optimizer: whose groups' current rates are the peaks.
        schedule: "wsd" (warm-up, stable, linear decay), "linear", "cosine" or "constant".
        total_steps: where the rate reaches zero.
        warmup_steps: length of the linear warm-up.
        decay_frac: share of `total_steps` spent decaying, "wsd" only.

    Raises:
        ValueError: unknown schedule, or lengths that do not fit together.
    """
    if schedule not in get_args(ScheduleName):
        raise unknown_name("schedule", schedule, get_args(ScheduleName))
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps must be in [0, total_steps = {total_steps}], got {warmup_steps}")
    if not 0 <= decay_frac <= 1:
        raise ValueError(f"decay_frac must be in [0, 1], got {decay_frac}")
    # A partial, not an object: LambdaLR.state_dict copies the attributes of callable objects.
    factor = functools.partial(
        lr_factor,
        schedule=schedule,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        decay_frac=decay_frac,
    )
    return LambdaLR(optimizer, factor)

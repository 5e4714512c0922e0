"""A setting's optimizer and schedule."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from ...tasks.base import missing_extra
from ...tasks.recipes import MuonAdamW, build_scheduler, decay_groups
from .settings import Setting

#: Share of the run after which "step" lowers the rate, and by what.
MILESTONES, STEP_FACTOR = (0.5, 0.75), 0.1


def build_optimizer(setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer as a user would write it.

    Raises:
        ModuleNotFoundError: its package is not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: Any = decay_groups(model, setting.weight_decay) if setting.is_text else trained
    betas = (0.9, 0.95) if setting.model == "gpt-modern" else (0.9, 0.999)
    match setting.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=setting.lr, momentum=setting.momentum, weight_decay=setting.weight_decay)
        case "adam":
            return torch.optim.Adam(groups, lr=setting.lr)
        case "adamw":
            return torch.optim.AdamW(groups, lr=setting.lr, betas=betas, weight_decay=setting.weight_decay)
        case "muon":
            return _muon(setting, model, betas)
        case "schedule-free":
            try:
                kind = importlib.import_module("schedulefree").AdamWScheduleFree
            except ModuleNotFoundError as error:
                raise missing_extra("schedulefree", "bench") from error
            found: torch.optim.Optimizer = kind(
                groups, lr=setting.lr, weight_decay=setting.weight_decay, warmup_steps=max(setting.steps // 20, 1)
            )
            return found


def _muon(setting: Setting, model: nn.Module, betas: tuple[float, float]) -> MuonAdamW:
    """Muon for hidden matrices; embeddings, the head and vectors with AdamW (Jordan et al. 2024)."""
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    hidden = linears[:-1]
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return MuonAdamW(
        [{"params": hidden, "weight_decay": setting.weight_decay}], [{"params": rest, "weight_decay": 0.0}],
        lr=setting.lr, betas=betas,
    )  # fmt: skip


def build_schedule(setting: Setting, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule, to be stepped after every optimizer step; None where the setting has none."""
    steps = setting.steps
    match setting.schedule:
        case "none":
            return None
        case "onecycle":
            return OneCycleLR(optimizer, max_lr=setting.lr, total_steps=steps)
        case "step":
            return LambdaLR(optimizer, functools.partial(_stairs, steps=steps))
    return build_scheduler(optimizer, setting.schedule, steps, min(setting.warmup, steps))


def _stairs(step: int, *, steps: int) -> float:
    return STEP_FACTOR ** sum(step >= share * steps for share in MILESTONES)
